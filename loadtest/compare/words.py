"""A comparison in words and tables: what the page and its Markdown twin both say.

A ratio is told as a difference in percent of the baseline: 1.021 is +2.1 %. A latency's ratio above 1 is slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from loadtest.compare import verdict
from loadtest.compare.design import AGAIN
from loadtest.compare.statistics import LEAST_ROUNDS, whole_rounds
from loadtest.page import ms

NAMED = 8  # variants that a headline names
DIGEST = 12  # hex digits shown of a sha256; 48 bits tell the bundles of one project apart
# The measures of the table, how each is headed and what it is counted in. Left out where it was not measured.
SHOWN = {
    "p50": ("p50", " ms"),
    "p90": ("p90", " ms"),
    "p99": ("p99", " ms"),
    "mean": ("mean", " ms"),
    "uncorrected_p50": ("p50 uncorrected", " ms"),
    "uncorrected_p99": ("p99 uncorrected", " ms"),
    "infer": ("infer (server)", " ms"),
    "ttft": ("first token", " ms"),
    "itl": ("between tokens", " ms"),
    "throughput": ("answers/s", "/s"),
    "tokens_per_s": ("tokens/s", "/s"),
    "cpu": ("CPU/request", " ms"),
    "memory": ("memory", " MB"),
}
OPEN_LOOP = ("uncorrected_p50", "uncorrected_p99")  # in a closed loop they are p50 and p99


@dataclass(frozen=True)
class Table:
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def interval(measure: Mapping[str, Any] | None) -> str:
    """`+2.1 % [1.2, 3.0]` of {"ratio", "low", "high"}; `-` where it was not measured."""
    return "-" if not measure or measure["ratio"] is None else verdict.interval(dict(measure))


def name_of(arm: str) -> str:
    return f"{arm.removesuffix(AGAIN)} (A/A)" if arm.endswith(AGAIN) else arm


def planned(design: Mapping[str, Any]) -> bool:
    """Whether requests leave at planned times, not when a user is free."""
    return design["rate"] is not None or design["arrivals"] == "recorded"


def load_of(run: Mapping[str, Any]) -> str:
    """The load in a few words."""
    design, tokens = run["design"], run["workload"].get("generated_tokens")
    what = f"completions of {tokens['mean']:g} tokens" if tokens else "next-token requests"
    if design["arrivals"] == "recorded":
        return f"{what}, as recorded traffic came"
    if design["rate"]:
        return f"{what}, {design['rate']:g} {design['arrivals']} arrivals/s"
    return f"{what}, {design['users']} user{'s' if design['users'] > 1 else ''} in a closed loop"


def headline(result: Mapping[str, Any]) -> str:
    models = [arm["model"] for arm in result["arms"]]
    whom = ", ".join(models) if len(models) <= NAMED else f"{len(models)} variants"
    return f"{whom} against {result['baseline']}"


def lead(run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    design, arms, load = run["design"], len(run["arms"]), load_of(run)
    started = run["started"].replace("T", " ").replace("+00:00", " UTC")
    void = f", {result['void_rounds']} of them void" if result.get("void_rounds") else ""
    return (
        f"{load[0].upper()}{load[1:]}; {result['rounds']} rounds{void}, each of one block of "
        f"{design['block_s']:g} s on each of {arms} arms, in balanced order. {started}"
    )


def unfit(result: Mapping[str, Any]) -> str:
    """The sentence for the very top where nothing may be claimed, else nothing."""
    if result["fit"]:
        return ""
    if result["aa"]["ratio"] is None:
        return (
            f"Too few rounds for any claim: {result['rounds'] - result['void_rounds']} count, and it takes "
            f"{LEAST_ROUNDS}. Measure longer."
        )
    return (
        f"Do not trust the differences below: this machine was not fit. {result['baseline']} against itself (A/A) "
        f"came out at {interval(result['aa'])} p50, where 0 is the truth. Stop what else runs, or measure longer."
    )


def aa(result: Mapping[str, Any]) -> str:
    if result["aa"]["ratio"] is None:
        return "The machine's own check, the baseline against itself (A/A), has too few rounds."
    found = "passes" if result["fit"] else "was not fit"
    return (
        f"{result['baseline']} against itself (A/A, the machine's own check): {interval(result['aa'])} p50, where 0 is "
        f"the truth; the machine {found}."
    )


def sentences(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(outcome, sentence) of each arm against the baseline."""
    return [(arm["outcome"], arm["sentence"]) for arm in result["arms"]]


def notes(run: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting a figure."""
    said = list(result.get("said", []))
    facts = facts_of(run)
    for field, word in (("precision", "precision"), ("layers", "number of layers"), ("dim", "width C"),
                        ("vocab_size", "vocabulary"), ("context", "context"), ("provider", "provider"),
                        ("head", "head"), ("flavor", "flavor")):  # fmt: skip
        values = {model: each[field] for model, each in facts.items() if each.get(field) is not None}
        usual = values.get(result["baseline"])
        others = ", ".join(f"{model} {value}" for model, value in values.items() if value != usual)
        if others:
            said.append(
                f"not the baseline's {word}, {usual}: {others}; a difference in latency is not of the activation alone"
            )
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


def width(facts: Mapping[str, Any]) -> str:
    """The hidden width H, and for a gated form whether it is the matched or the full one."""
    if not facts.get("hidden") or not facts.get("dim"):
        return "-"
    said = f"{facts['hidden']} = {facts['hidden'] / facts['dim']:.2g} C"
    return f"{said}, {facts['gated_width']}" if facts.get("gated_width") else said


def digests(facts: Mapping[str, Any]) -> dict[str, str]:
    """sha256 by file name, of the bundle; empty where the server did not tell."""
    return dict(facts.get("files") or {})


def arms_table(run: Mapping[str, Any], result: Mapping[str, Any], blocks: pl.DataFrame) -> Table:
    """Every measure of every arm: the baseline as it is, the others as a difference from it."""
    names = [name for name in SHOWN if planned(run["design"]) or name not in OPEN_LOOP]
    names = [name for name in names if any((arm.get(name) or {}).get("ratio") for arm in result["arms"])]
    columns = {name: verdict.MEASURES[name] for name in names}
    itself = medians(blocks, list(columns.values())).get(result["baseline"], {})
    absolute = [
        "-" if (value := itself.get(columns[name])) is None else f"{value:.2f}{SHOWN[name][1]}" for name in names
    ]
    rows = [(result["baseline"], "baseline", *absolute)]
    rows += [(arm["model"], arm["outcome"], *(interval(arm.get(name)) for name in names)) for arm in result["arms"]]
    check = (name_of(result["baseline"] + AGAIN), "check", interval(result["aa"]))
    rows.append((*check, *("-" for _ in names[1:])))
    return Table(("variant", "outcome", *(SHOWN[name][0] for name in names)), tuple(rows))


def medians(blocks: pl.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Median over the blocks of each arm, of rounds without a void block."""
    of = [pl.col(name).cast(pl.Float64).fill_nan(None).median() for name in columns]
    rows = whole_rounds(blocks).group_by("arm").agg(of)
    return {row["arm"]: {name: row[name] for name in columns} for row in rows.to_dicts()}


def facts_table(run: Mapping[str, Any]) -> Table:
    facts = facts_of(run)
    rows = []
    for model, each in facts.items():
        sha256 = digests(each).get("model.onnx", "")
        shape = f"{each['layers']} × {each['dim']}" if each.get("layers") and each.get("dim") else "-"
        parameters = f"{each['parameters']:,}" if each.get("parameters") else "-"
        size = f"{each['bytes'] / 1e6:.1f} MB" if each.get("bytes") else ""
        rows.append((
            model, str(each.get("activation", "-")), str(each.get("precision", "-")), parameters, size, shape,
            width(each), str(each.get("vocab_size", "-")), str(each.get("context", "-")),
            sha256[:DIGEST] or "-",
        ))  # fmt: skip
    headings = ("variant", "activation", "precision", "parameters", "size", "layers × C", "hidden", "V", "context",
                "sha256 of the model")  # fmt: skip
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]  # no column of sizes where none is known
    return Table(tuple(headings[i] for i in kept), tuple(tuple(row[i] or "-" for i in kept) for row in rows))


def widths(run: Mapping[str, Any]) -> str:
    """What matched and full width mean, or nothing where no form is gated."""
    told = {model: each["gated_width"] for model, each in facts_of(run).items() if each.get("gated_width")}
    if not told:
        return ""
    kinds = set(told.values())
    whose = f"at {kinds.pop()} width" if len(kinds) == 1 else ", ".join(f"{m} at {kind}" for m, kind in told.items())
    return (
        f"Gated forms ({', '.join(told)}) are {whose}. They have three matrices where others have two: at matched "
        "width, 8/3 C, as many weights as an ungated block of 4 C; at full width, 4 C, half as many again."
    )


def workload(run: Mapping[str, Any]) -> str:
    facts = run["workload"]
    prompts, generated = facts.get("prompt_tokens"), facts.get("generated_tokens")
    said = [f"{facts['source']}: {facts['requests']} requests, sent as {facts['sent_as']}"]
    said += [f"prompts of {_spread(prompts)} tokens"] if prompts else []
    said += [f"{_spread(generated)} tokens generated"] if generated else []
    cold = "cold: no prompt begins as one before" if facts["cache"] == "cold" else "warm: each was computed before"
    said.append(f"the server's prefix cache {cold}")
    return "; ".join(said)


def _spread(of: Mapping[str, float]) -> str:
    return f"{of['min']:g}" if of["min"] == of["max"] else f"{of['min']:g} to {of['max']:g} (mean {of['mean']:g})"


def quantiles_table(latencies: Mapping[str, np.ndarray]) -> Table:
    shares = (50, 90, 99, 99.9, 100)
    rows = [
        (name_of(arm), f"{len(values)}", *(ms(float(q)) for q in np.percentile(values, shares)))
        for arm, values in latencies.items()
        if len(values)
    ]
    return Table(("arm", "answers", "p50", "p90", "p99", "p99.9", "slowest"), tuple(rows))
