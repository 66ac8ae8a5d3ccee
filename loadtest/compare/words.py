"""A comparison in words and tables: what the page and its Markdown twin both say.

A ratio is told as a difference in percent of the baseline: 1.021 is +2.1 %. A latency's ratio above 1 is slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from loadtest.page import ms

AGAIN = ":again"  # the end of the name of the arm that is the baseline once more
DIGEST = 12  # hex digits shown of a sha256; 48 bits tell the bundles of one project apart
# What is compared beside the primary measure, and how its column is headed.
MEASURES = {
    "p50": "p50",
    "p90": "p90",
    "p99": "p99",
    "mean": "mean",
    "infer": "infer (server)",
    "throughput": "answers/s",
    "cpu": "CPU/request",
    "memory": "memory",
}


@dataclass(frozen=True)
class Table:
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def percent(ratio: float) -> str:
    return f"{_round(ratio):+.1f} %"


def interval(measure: Mapping[str, Any] | None) -> str:
    """`+2.1 % [1.2, 3.0]` of {"ratio", "low", "high"}; `-` where it was not measured."""
    if not measure or measure.get("ratio") is None:
        return "-"
    if measure.get("low") is None or measure.get("high") is None:
        return percent(measure["ratio"])
    return f"{percent(measure['ratio'])} [{_round(measure['low']):.1f}, {_round(measure['high']):.1f}]"


def _round(ratio: float) -> float:
    return round((ratio - 1) * 100, 1) + 0.0  # not -0.0


def name_of(arm: str) -> str:
    return f"{arm.removesuffix(AGAIN)} (A/A)" if arm.endswith(AGAIN) else arm


def load_of(design: Mapping[str, Any]) -> str:
    """The load in a few words."""
    completions = design.get("completions")
    what = f"completions of {completions} tokens" if completions else "next-token requests"
    if design.get("rate"):
        return f"{what}, {design['rate']:g} {design.get('arrivals', 'constant')} arrivals/s"
    users = design.get("users") or 1
    return f"{what}, {users} user{'s' if users > 1 else ''} in a closed loop"


def headline(run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    others = [arm["model"] for arm in result["arms"] if arm["model"] != result["baseline"]]
    return f"{', '.join(others)} against {result['baseline']}"


def lead(run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    design, arms = run["design"], len(run["arms"])
    started = run["started"].replace("T", " ").replace("+00:00", " UTC")
    void = f", {result['void_rounds']} of them void" if result.get("void_rounds") else ""
    return (
        f"{load_of(design)[0].upper()}{load_of(design)[1:]}; {result['rounds']} rounds{void}, each of one block of "
        f"{design['block_s']:g} s on each of {arms} arms, in balanced order. {started}"
    )


def unfit(result: Mapping[str, Any]) -> str:
    """The sentence for the very top where the machine was not fit, else nothing."""
    if result["fit"]:
        return ""
    return (
        f"Do not trust the differences below: this machine was not fit. {result['baseline']} against itself (A/A) "
        f"came out at {interval(result['aa'])} p50, where 0 is the truth. Close what else runs, or measure longer."
    )


def aa(result: Mapping[str, Any]) -> str:
    found = "which holds 0: fit" if result["fit"] else "which it should not: not fit"
    return f"{result['baseline']} against itself (A/A, the machine's own check): {interval(result['aa'])} p50, {found}."


def sentences(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(outcome, sentence) of each arm against the baseline."""
    return [(arm["outcome"], arm["sentence"]) for arm in result["arms"] if arm["model"] != result["baseline"]]


def notes(run: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting a figure."""
    said = list(result.get("notes", []))
    if result.get("unfinished"):
        said.append(result["unfinished"])
    facts = facts_of(run)
    for field, word in (("precision", "precision"), ("layers", "number of layers"), ("dim", "width C"),
                        ("vocab_size", "vocabulary"), ("context", "context"), ("provider", "provider"),
                        ("head", "head"), ("flavor", "flavor")):  # fmt: skip
        values = {model: each[field] for model, each in facts.items() if each.get(field) is not None}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{model} {value}" for model, value in values.items())
            said.append(f"the variants differ in {word} ({told}): latencies differ by more than the activation")
    unfused = [model for model, each in facts.items() if each.get("unfused")]
    if unfused and len(unfused) < len(facts):
        said.append(f"without a fused operator: {', '.join(unfused)}; the others have one")
    return said


def arms_of(run: Mapping[str, Any]) -> list[str]:
    """In the order in which every picture and table has them: the baseline first, the A/A arm last."""
    return sorted((arm["arm"] for arm in run["arms"]), key=lambda arm: arm.endswith(AGAIN))


def facts_of(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the server said of each model, baseline first as in the run; the A/A arm is the baseline's model again."""
    return {arm["model"]: arm["facts"] or {} for arm in run["arms"] if not arm["arm"].endswith(AGAIN)}


def width(facts: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """The hidden width H, and for a gated form whether it is the matched or the full one."""
    if not facts.get("hidden") or not facts.get("dim"):
        return "-"
    said = f"{facts['hidden']} = {facts['hidden'] / facts['dim']:.2g} C"
    if facts.get("kind") != "gated":
        return said
    if facts["hidden"] == baseline.get("hidden") and baseline.get("kind") != "gated":
        return f"{said}, full"
    # Three matrices of C x H instead of two: as many weights at two thirds of 4 C, in whole vectors of 8 floats.
    if abs(facts["hidden"] - 8 * facts["dim"] / 3) <= 8:
        return f"{said}, matched"
    return f"{said}, full" if facts["hidden"] == 4 * facts["dim"] else said


def digests(facts: Mapping[str, Any]) -> dict[str, str]:
    """sha256 by file name, of the bundle; empty where the server did not tell."""
    return dict(facts.get("files") or {})


def arms_table(result: Mapping[str, Any], blocks: pl.DataFrame) -> Table:
    """Every measure of every arm: the baseline as it is, the others as a difference from it."""
    measured = [name for name in MEASURES if any(_of(arm, name) for arm in result["arms"])]
    columns = {"p50": "p50_ms", "p90": "p90_ms", "p99": "p99_ms", "mean": "mean_ms", "infer": "infer_ms",
               "throughput": "requests_per_s", "cpu": "cpu_ms", "memory": "rss_mb"}  # fmt: skip
    units = {"throughput": "/s", "memory": " MB"}
    itself = medians(blocks, list(columns.values())).get(result["baseline"], {})

    def absolute(name: str) -> str:
        value = itself.get(columns[name])
        return "-" if value is None else f"{value:.2f}{units.get(name, ' ms')}"

    rows = [(result["baseline"], "baseline", *(absolute(name) for name in measured))]
    rows += [
        (arm["model"], arm["outcome"], *(interval(_of(arm, name)) for name in measured))
        for arm in result["arms"]
        if arm["model"] != result["baseline"]
    ]
    again = (name_of(result["baseline"] + AGAIN), "check", interval(result["aa"]))
    rows.append((*again, *("-" for _ in measured[1:])))
    return Table(("variant", "outcome", *(MEASURES[name] for name in measured)), tuple(rows))


def _of(arm: Mapping[str, Any], measure: str) -> Mapping[str, Any] | None:
    found = arm.get(measure)
    return found if isinstance(found, Mapping) and found.get("ratio") is not None else None


def medians(blocks: pl.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Median over the blocks of each arm, of rounds without a void block."""
    rows = whole(blocks).group_by("arm").agg(pl.col(name).fill_nan(None).median() for name in columns)
    return {row["arm"]: {name: row[name] for name in columns} for row in rows.to_dicts()}


def whole(blocks: pl.DataFrame) -> pl.DataFrame:
    """The blocks of rounds of which none is void, as the paired statistics take them."""
    void = blocks.filter(pl.col("void") != "")["round"].unique()
    return blocks.filter(~pl.col("round").is_in(void.implode()))


def facts_table(run: Mapping[str, Any], result: Mapping[str, Any]) -> Table:
    facts = facts_of(run)
    baseline = facts.get(result["baseline"], {})
    rows = []
    for model, each in facts.items():
        sha256 = digests(each).get("model.onnx", "")
        shape = f"{each['layers']} × {each['dim']}" if each.get("layers") and each.get("dim") else "-"
        parameters = f"{each['parameters']:,}" if each.get("parameters") else "-"
        size = f"{each['bytes'] / 1e6:.1f} MB" if each.get("bytes") else ""
        rows.append((
            model, str(each.get("activation", "-")), str(each.get("precision", "-")), parameters, size, shape,
            width(each, baseline), str(each.get("vocab_size", "-")), str(each.get("context", "-")),
            sha256[:DIGEST] or "-",
        ))  # fmt: skip
    headings = ("variant", "activation", "precision", "parameters", "size", "layers × C", "hidden", "V", "context",
                "sha256 of the model")  # fmt: skip
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]  # no column of sizes where none is known
    return Table(tuple(headings[i] for i in kept), tuple(tuple(row[i] or "-" for i in kept) for row in rows))


def widths(run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One sentence on the width of gated forms, or nothing where there are none."""
    facts = facts_of(run)
    baseline = facts.get(result["baseline"], {})
    told = {model: width(each, baseline) for model, each in facts.items() if each.get("kind") == "gated"}
    if not told:
        return ""
    said = [f"{model} has H = {words}" for model, words in told.items()]
    return (
        f"Gated forms have three matrices where others have two: {'; '.join(said)}. Matched width has as many weights "
        "as an ungated block of 4 C, full width half as many again."
    )


def quantiles_table(latencies: Mapping[str, Any]) -> Table:
    import numpy as np

    shares = (50, 90, 99, 99.9, 100)
    rows = [
        (name_of(arm), f"{len(values)}", *(ms(float(q)) for q in np.percentile(values, shares)))
        for arm, values in latencies.items()
        if len(values)
    ]
    return Table(("arm", "answers", "p50", "p90", "p99", "p99.9", "slowest"), tuple(rows))
