"""The tables and charts of the study of cost, all from the medians that cost_samples.py came to."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from export.bench import EXPANSION, MODEL, Way
from models.activations import Activation
from studies.cost_samples import PLACES, WAYS, WIDE, Cost, DeviceCost, Spread, Where, served, share
from studies.roofline import Rates, intensity, operations
from studies.study import Cell, Chart, Line, Table


def _order(costs: Mapping[str, Cost]) -> list[str]:
    """From the cheapest as it is served."""
    return sorted(costs, key=lambda name: costs[name]["alone"][served(costs[name]["alone"])].median)


def nanoseconds_table(costs: Mapping[str, Cost]) -> Table:
    rows: list[list[Cell]] = []
    for name in _order(costs):
        rows.append([name])
        for where in ("alone", "ffn", "model"):
            found = costs[name][where]
            rows[-1] += [_figure(found[way].median) if way in found else None for way in WAYS]
        alone = costs[name]["alone"][served(costs[name]["alone"])]
        rows[-1].append(f"{alone.low:.3g} to {alone.high:.3g}")
    columns = [f"{where}, {way}" for where in ("alone", "block", "model") for way in WAYS]
    return Table(
        "Nanoseconds per hidden element",
        ("activation", *columns, "alone, quartiles"),
        rows,
        "Medians. Fused: our kernel. Unfused: ONNX Runtime's own operators. A block has 4 operations for each of its C "
        "channels, gated forms 6; hidden elements of a model are counted over its layers.",
    )


def _figure(value: float) -> float:
    return float(f"{value:.3g}")


def share_table(costs: Mapping[str, Cost]) -> Table:
    rows: list[list[Cell]] = []
    for name in _order(costs):
        rows.append([name])
        for where in PLACES:
            ways = [way for way in WAYS if way in costs[name][where] and way in costs[name][PLACES[where][0]]]
            found = {way: 100 * share(costs[name], where, way) for way in ways}
            rows[-1] += [_figure(found[way]) if way in found else None for way in ("fused", "unfused")]
    columns = [f"{said}, {way}" for _, said in PLACES.values() for way in ("fused", "unfused")]
    return Table(
        "Share of the time, %",
        ("activation", *columns),
        rows,
        "What it takes alone at the same size, over the time of the whole.",
    )


def roof_table(records: Mapping[str, Activation], costs: Mapping[str, Cost], rates: Rates) -> Table:
    rows: list[list[Cell]] = []
    for name in _order(costs):
        record, found = records[name], costs[name]["alone"]
        reached = operations(record) / found[served(found)].median
        roof = rates.roof(intensity(record), cached=True)
        rows.append(
            [name, operations(record), _figure(intensity(record)), _figure(reached), _figure(roof),
             _figure(100 * reached / roof), served(found)]
        )  # fmt: skip
    return Table(
        "Against the roof",
        ("activation", "operations", "a byte", "GFLOP/s", "roof", "% of the roof", "way"),
        rows,
        "Per hidden element, alone at the model's width. The roof is the lesser of "
        f"{rates.gflop_per_s:.0f} GFLOP/s and {rates.cache_gb_per_s:.0f} GB/s, a copy of the same size; past "
        f"the caches a copy has {rates.memory_gb_per_s:.0f} GB/s. Products are multiply-adds on every lane, and the "
        "operations of an exp are not: what lacks to the roof is no fault of the kernel alone.",
    )


def device_tables(gpu: tuple[dict[str, DeviceCost], Any] | None) -> list[Table]:
    if gpu is None:
        return []
    rows: list[list[Cell]] = [
        [name, _figure(1e3 * cost.alone.median), _figure(1e3 * cost.ffn.median),
         _figure(100 * cost.alone.median / cost.ffn.median)]
        for name, cost in sorted(gpu[0].items(), key=lambda item: item[1].alone.median)
    ]  # fmt: skip
    columns = ("activation", "alone, ps per element", "block, ps per element", "share, %")
    return [Table("On the GPU", columns, rows, "torch eager, fp16, C = 4096.")]


def _bars(names: list[str], name: str, found: Sequence[Spread | None]) -> Line:
    return Line(
        name,
        names,
        [None if each is None else each.median for each in found],
        low=[None if each is None else each.low for each in found],
        high=[None if each is None else each.high for each in found],
    )


def alone_chart(costs: Mapping[str, Cost]) -> Chart:
    names = _order(costs)
    ways: tuple[Way, ...] = ("fused", "unfused")
    lines = [_bars(names, way, [costs[each]["alone"].get(way) for each in names]) for way in ways]
    lines = [line for line in lines if any(line.y)]
    return Chart(
        "alone", "One activation alone", "activation", "ns per hidden element", lines, kind="bars",
        log_y=True, note="Medians and quartiles.",
    )  # fmt: skip


def share_chart(costs: Mapping[str, Cost], places: Sequence[Where], small: float) -> Chart:
    """Of these places; from `small` on it is not small."""
    names = _order(costs)
    lines = [
        Line(said, names, [100 * share(costs[each], where, served(costs[each]["alone"])) for each in names])
        for where, said in ((where, PLACES[where][1]) for where in places)
    ]
    return Chart(
        "share", "Share of the time, as it is served", "activation", "% of the time", lines, kind="bars",
        note=f"Fused where there is a kernel. {100 * small:g} % is not small.",
    )  # fmt: skip


def roofline_chart(records: Mapping[str, Activation], costs: Mapping[str, Cost], rates: Rates) -> Chart:
    """Every activation alone, and blocks, under the machine's roofs."""
    points: dict[str, list[tuple[float, float, str]]] = {way: [] for way in WAYS}
    for name, cost in costs.items():
        for way in WAYS:
            if way in cost["alone"]:
                reached = operations(records[name]) / cost["alone"][way].median
                points[way].append((intensity(records[name]), reached, name))
    C, rows = WIDE // EXPANSION, MODEL["context"]
    points["blocks"] = []
    for name, cost in costs.items():
        products = (3 if records[name].gated else 2) * 2 * C
        moved = 4 * (products / 2 / rows + 2 / EXPANSION)  # weights for each of the rows' elements, x in and y out
        whole = products + operations(records[name])
        points["blocks"].append((whole / moved, whole / cost["ffn wide"][served(cost["ffn wide"])].median, name))
    lines = [
        Line(said, [x for x, *_ in found], [y for _, y, _ in found], names=[name for *_, name in found])
        for said, found in ((each, sorted(of)) for each, of in points.items())
        if found
    ]
    ridges = (rates.gflop_per_s / rates.cache_gb_per_s, rates.gflop_per_s / rates.memory_gb_per_s)
    reach = sorted([2.0**-4, 1.0, 2.0**8, *ridges])
    for said, cached in (("roof, in cache", True), ("roof, memory", False)):
        roof = functools.partial(rates.roof, cached=cached)
        lines.append(Line(said, reach, [roof(each) for each in reach], dashed=True))
    return Chart(
        "roofline", "Under this machine's roof", "operations per byte", "GFLOP/s", lines, kind="points",
        log_x=True, log_y=True,
        note="Each point is an activation alone, or a block of C = "
        f"{C}; the roofs are what products and copies reach here. A name stands once: what else is of that activation, "
        "alone, stands at the same operations per byte, and the table of the page names every point.",
    )  # fmt: skip


def percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"
