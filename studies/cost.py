"""Claim 9: exp() is expensive, and small beside the matmul all the same.

Source: 002, 003. An H100 does 989 TFLOP/s of fp16 products and 3.9 of special functions. Refuted by activations with an
exp that cost no more than relu, or by one that takes a tenth or more of the feed-forward block or of the whole model.

Measured: nanoseconds per hidden element of every activation, alone, in its block at two widths, and in the default
model, fused, unfused and in torch (cost_samples.py), against the machine's own roof (roofline.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from export.bench import EXPANSION, MODEL
from export.ops.device import ON_CUDA
from models.activations import Activation, registry
from models.gpt import ActuaryConfig
from studies.cost_samples import (
    THREADS,
    WAYS,
    WIDE,
    Cost,
    DeviceCost,
    Where,
    fused_library,
    measure,
    measure_device,
    served,
    share,
)
from studies.cost_shown import (
    alone_chart,
    device_tables,
    nanoseconds_table,
    percent,
    roof_table,
    roofline_chart,
    share_chart,
    share_table,
)
from studies.roofline import EXP, MEMORY_BYTES, PRODUCTS, Rates, special
from studies.study import Claim, Figure, Finding, Options, Verdict

CLAIM = Claim(
    number=9,
    name="cost",
    title="exp() is expensive, and small beside the products",
    statement="exp() is expensive: an H100 has 989 TFLOP/s of fp16 products and 3.9 of special functions. Beside the "
    "products of a model it is small all the same.",
    source="002, 003",
    refuted_by="activations with an exp that cost less than twice relu alone, or one of them that takes a tenth or "
    "more of its feed-forward block at GPT-2's width or of the whole model, computed as it is served.",
)
DEAR = 2.0  # times relu's cost, alone: the least that counts as expensive
SMALL = 0.1  # share of the time: the most that counts as small
H100 = (989e12, 3.9e12)  # operations per second: fp16 products, special functions
PASSES, ROUNDS = 4, 5
QUICK_PASSES, QUICK_ROUNDS = 2, 3
DECIDING: tuple[Where, ...] = ("ffn wide", "model")


def run(options: Options) -> Finding:
    passes, rounds = (QUICK_PASSES, QUICK_ROUNDS) if options.quick else (PASSES, ROUNDS)
    passes = passes if options.seeds is None else options.seeds  # what repeats here are passes
    records = dict(registry())
    options.report("building the fused operators", 0.0)
    library, said = fused_library(options.kept)
    costs, rates = measure(records, library, passes, rounds, options.report)
    gpu: tuple[Any, Any] | None = None
    if torch.cuda.is_available():
        gpu = measure_device(records, ON_CUDA, passes * rounds, options.report)
    return finding(records, costs, rates, gpu, {
        "threads": f"{THREADS}, and its own time alone",
        "samples of each": f"{passes} passes over all cases in a fresh order, {rounds} rounds each; medians, quartiles",
        "fused operators": said,
        "model": f"the default shape, {MODEL['layers']} layers, C = {MODEL['dim']}, one prompt of {MODEL['context']} "
        f"tokens; blocks of H = 4 C, gated ones in the model of {ActuaryConfig(activation='swiglu', **MODEL).hidden}",
        "roof": f"products of {' and '.join(' x '.join(map(str, shape)) for shape in PRODUCTS)} in ONNX Runtime; "
        f"copies of {MEMORY_BYTES >> 20} MiB and "
        "of an activation's own size; the best of the samples",
        "operations": f"an exp counts {EXP}, erf and tanh {EXP + 4}, sigmoid {EXP + 3}, softplus {2 * EXP + 4}, what a "
        "vector library spends; all else 1",
        "GPU": torch.cuda.get_device_name() if gpu else "skipped: torch sees no CUDA device",
    })  # fmt: skip


def by_the_rates(C: int, products: float, specials: float) -> float:
    """Share of a block's time at these rates: one special function a hidden element, and 4 C operations in products."""
    special_s, product_s = 1 / specials, 4 * C / products
    return special_s / (special_s + product_s)


def judge(records: Mapping[str, Activation], costs: Mapping[str, Cost]) -> tuple[Verdict, str]:
    """Dear: the median of those with an exp costs DEAR times relu's alone. Small: each takes less than SMALL of the
    wide block and of the model. holds: both; did not reproduce: neither, or small for less than half of them."""
    names = [name for name, record in records.items() if special(record)]
    way = {name: served(costs[name]["alone"]) for name in names}
    relu = costs["relu"]["alone wide"]
    times = {name: costs[name]["alone wide"][way[name]].median / relu[served(relu)].median for name in names}
    middle = median(times.values())
    shares = {name: {where: share(costs[name], where, way[name]) for where in DECIDING} for name in names}
    worst = {name: max(each.values()) for name, each in shares.items()}
    large = sorted((name for name in names if worst[name] >= SMALL), key=worst.__getitem__, reverse=True)
    dear, small = middle >= DEAR, not large
    sentence = (
        f"Alone an activation with an exp costs {middle:.1f} times relu in the middle, {min(times.values()):.1f} to "
        f"{max(times.values()):.1f}; of the whole model, computed as it is served, it takes "
        f"{percent(median(each['model'] for each in shares.values()))} in the middle, of a block of C = "
        f"{WIDE // EXPANSION} {percent(median(each['ffn wide'] for each in shares.values()))}"
    )
    if large:
        sentence += f"; a tenth or more: {', '.join(f'{name} {percent(worst[name])}' for name in large)}"
    if dear and small:
        return "holds", sentence + "."
    mostly = len(large) <= len(names) / 2
    return ("holds in part" if dear and mostly else "did not reproduce"), sentence + "."


def finding(
    records: Mapping[str, Activation],
    costs: Mapping[str, Cost],
    rates: Rates,
    gpu: tuple[dict[str, DeviceCost], Any] | None,
    settings: dict[str, Any],
) -> Finding:
    verdict, sentence = judge(records, costs)
    return Finding(
        verdict=verdict,
        sentence=sentence,
        figures=_figures(records, costs, rates, gpu),
        settings=settings,
        tables=[
            nanoseconds_table(costs),
            share_table(costs),
            roof_table(records, costs, rates),
            *device_tables(gpu),
        ],
        charts=[
            alone_chart(costs),
            share_chart(costs, DECIDING, SMALL),
            roofline_chart(records, costs, rates),
        ],
        data={
            "digests": {name: record.digest for name, record in records.items()},
            "ns": {
                name: {
                    where: {way: each.median for way, each in cost[where].items() if way in WAYS}
                    for where in ("alone", "ffn", "model")
                }
                for name, cost in costs.items()
            },
            "rates": dataclasses.asdict(rates),
        },
    )


def _figures(
    records: Mapping[str, Activation], costs: Mapping[str, Cost], rates: Rates, gpu: tuple[Any, Any] | None
) -> list[Figure]:
    silu = costs["silu"]
    alone = silu["alone wide"]
    a_second = 1e9 / alone[served(alone)].median
    figures = [
        Figure("this machine: products", f"{rates.gflop_per_s:.0f} GFLOP/s on {THREADS} thread", "989 TFLOP/s (H100)"),
        Figure("this machine: silu", f"{a_second / 1e9:.2g}e9 elements/s", "3.9e12 special functions/s (H100)"),
        Figure(
            "operations in products in the time of one",
            f"{rates.gflop_per_s * 1e9 / a_second:.0f}",
            f"{H100[0] / H100[1]:.0f} (H100, one special function)",
        ),
    ]
    for name in ("sigmoid", "gelu", "silu"):
        relu, own = (costs[each]["alone wide"] for each in ("relu", name))
        times = own[served(own)].median / relu[served(relu)].median
        figures.append(Figure(f"{name} alone, times relu", f"{times:.1f}", "expensive", times >= DEAR))
    widths: tuple[tuple[Where, int], ...] = (("ffn", MODEL["dim"]), ("ffn wide", WIDE // EXPANSION))
    for where, C in widths:
        for name in ("silu", "gelu"):
            ours = {way: share(costs[name], where, way) for way in costs[name][where] if way in WAYS}
            best = ours[served(costs[name]["alone"])]
            said = ", ".join(f"{way} {percent(value)}" for way, value in ours.items())
            theirs = f"small; {percent(by_the_rates(C, *H100))} by the H100's rates"
            figures.append(Figure(f"{name}, share of its block at C = {C}", said, theirs, best < SMALL))
    for name in ("silu", "gelu"):
        ours = {way: share(costs[name], "model", way) for way in costs[name]["model"] if way in WAYS}
        said = ", ".join(f"{way} {percent(value)}" for way, value in ours.items())
        small = ours[served(costs[name]["alone"])] < SMALL
        figures.append(Figure(f"{name}, share of the whole model", said, "small", small))
    if gpu is None:
        figures.append(Figure("on a GPU", "skipped: torch sees no CUDA device", "989 and 3.9 TFLOP/s (H100)"))
    else:
        device, of = gpu
        figures += [
            Figure("on the GPU: products, fp16", f"{of.tflop_per_s:.0f} TFLOP/s", "989 (H100)"),
            Figure("on the GPU: exp", f"{of.exp_per_s:.2g} T/s, at {of.gb_per_s:.0f} GB/s of copy", "3.9 (H100)"),
            Figure(
                "on the GPU: silu, share of its block at C = 4096",
                percent(device["silu"].alone.median / device["silu"].ffn.median),
                f"small; {percent(by_the_rates(4096, *H100))} by the rates",
                device["silu"].alone.median / device["silu"].ffn.median < SMALL,
            ),
        ]
    return figures
