"""Visits -> docs/benchmarks.md and benchmarks.svg: who is ahead, cell by cell, and by how much.

Requests/s are medians over rounds with the lowest and highest round; latencies are percentiles over the requests of
all rounds. A ratio is taken within each round, then its median: what slows the machine slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.bench import workloads
from loadtest.bench.contenders import OURS, Contender
from loadtest.bench.visits import Record, Visits, takes_part
from loadtest.bench.workloads import Workload

PRECISIONS = ("fp32", "int8")
# What issue 4 asks for of ours over the best rival; 0 where it asks for nothing.
ASKED = {
    **{workload.name: {"fp32": 1.25, "int8": 1.5} for workload in workloads.CLOSED},
    **{workload.name: {"fp32": 4.0, "int8": 4.0} for workload in workloads.REUSE},
    **{workload.name: {"fp32": 1.0, "int8": 1.0} for workload in workloads.GENERATE},
}
OVER_TRANSFORMERS = 2.0  # in generation
OVER_INFER_MS = 0.8  # p50 of one caller over the session's own run time, at most
TURNS_COST = 0.05
QUIET_CORES = 0.1  # of others; the machine's own housekeeping takes 0.02
DRAWN = ("closed", "typing", "preamble", "generate")


@dataclass(frozen=True)
class Row:
    """One contender in one cell."""

    contender: Contender
    per_s: tuple[float, float, float]  # median, lowest and highest round
    p50_ms: float
    p99_ms: float
    requests: int
    failures: int
    rounds: dict[int, float]
    note: str


@dataclass(frozen=True)
class Versus:
    """Ours against the best rival of the same precision."""

    ours: Row
    rival: Row
    ratio: tuple[float, float, float]  # median, lowest and highest round


def row(visits: Visits, workload: Workload, contender: Contender) -> Row | None:
    """None where it was not visited."""
    records = [r for r in visits.of(workload) if r["contender"] == contender.name]
    if not records:
        return None
    notes = {r["skipped"] for r in records if r["skipped"]} | {r["first_failure"] for r in records if r["failures"]}
    good = [r for r in records if not r["skipped"]]
    rounds = {r["round"]: r["per_s"] for r in good}
    latencies = [ms for r in good for ms in r["latency_ms"]]
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (0.0, 0.0)
    return Row(
        contender, spread(list(rounds.values())), float(p50), float(p99), len(latencies),
        sum(r["failures"] for r in good), rounds, "; ".join(sorted(notes)),
    )  # fmt: skip


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return (statistics.median(values), min(values), max(values)) if values else (0.0, 0.0, 0.0)


def versus(rows: Sequence[Row]) -> Versus | None:
    """Of rows of one precision; None where ours or every rival is missing."""
    ours = [r for r in rows if r.contender.ours and r.requests]
    rivals = [r for r in rows if not r.contender.ours and r.requests]
    if not ours or not rivals:
        return None
    rival = max(rivals, key=lambda r: r.per_s[0])
    shared = ours[0].rounds.keys() & rival.rounds.keys()
    return Versus(ours[0], rival, spread([ours[0].rounds[n] / rival.rounds[n] for n in shared if rival.rounds[n]]))


def tables(visits: Visits, contenders: Sequence[Contender]) -> list[tuple[Workload, str, list[Row]]]:
    """(workload, precision, rows with the fastest first)"""
    found = []
    for workload in workloads.ALL:
        for precision in PRECISIONS:
            those = [c for c in contenders if c.precision == precision and takes_part(c, workload)]
            rows = [r for c in those if (r := row(visits, workload, c))]
            if rows:
                found.append((workload, precision, sorted(rows, key=lambda r: -r.per_s[0])))
    return found


def document(visits: Visits, contenders: Sequence[Contender], facts: dict[str, Any]) -> str:
    """The whole of docs/benchmarks.md."""
    found = [each for each in tables(visits, contenders) if each[0].kind != "turns"]
    parts = [HEAD.format(**facts), _disturbed(visits), "## Ours against the best rival", _summary(found)]
    parts += ["![Requests per second](benchmarks.svg)", _overhead(visits, contenders), _turned(visits)]
    parts += ["## Memory, start, agreement", _servers(visits, contenders, facts)]
    parts += ["## Every cell"]
    for workload, precision, rows in found:
        parts += [f"### {workload.name}, {precision}{_rates(visits, workload, precision)}", _cell(workload, rows)]
    parts += ["## How", HOW.format(**facts), _settings(contenders), _ceiling(facts["ceiling"]), _quiet(visits)]
    return "\n\n".join(part for part in parts if part) + "\n"


HEAD = """# Benchmarks

Written by `make bench` ({command}); not to be edited. {date}, {machine}, {system}, Python {python}.
{rounds} rounds, {seconds:g} s measured in each cell after {warm_s:g} s that are not. Actuary {version}, sources
{sources}.

GPT-2 shape, 14M parameters (6 layers, d=384, 6 heads, V=8192, context 512), random weights: the same for all. Client
and server share the {cores} cores. `wide` computes one prompt at a time on all cores, `narrow` a prompt a core."""

HOW = """All servers are up at once, and stopped (SIGSTOP) but for the one that is measured; each round visits every
contender in each workload, in an order drawn anew. No prompt is sent twice to a server. Before the first round every
engine must give transformers' own probabilities (fp32: to 0.001 in proportion). Rivals answer `POST /next` with the 10
likeliest tokens, ours `POST /v1/next-token` with `top_k` 10, logits, both probabilities and texts included. Rivals'
servers are in `loadtest/rivals/`, their versions and settings in `loadtest/bench/contenders.py`. ONNX Runtime,
OpenVINO and LitServe run PyTorch's own ONNX export with the vocabulary product on the last position alone and the top
in the graph; int8 is `quantize_dynamic`'s per channel, NNCF's post-training quantisation (OpenVINO, static steps) and
CTranslate2's own. LitServe batches up to 8 prompts around ONNX Runtime.

Open loops count latency from the planned send: `{open_all}` at 60 % of what the slowest engine reached with 8
callers and 64 tokens, `{open_near}` at 75 % of what the best rival of the precision did; a contender that cannot reach
the rate is not sent it. A typist's text grows by 1 or 2 tokens a request, from 32 to 256. Generation: rivals get the 8
prompts as one batch, ours from 8 callers.

Versions: {versions}."""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # The first column is text, the rest are numbers.
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _between(values: tuple[float, float, float]) -> str:
    return f"{number(values[0])} ({number(values[1])} to {number(values[2])})"


def _summary(found: Sequence[tuple[Workload, str, list[Row]]]) -> str:
    lines = []
    for workload, precision, rows in found:
        both = versus(rows)
        if both is None:
            continue
        asked = ASKED.get(workload.name, {}).get(precision, 0.0)
        wanted = "" if not asked else f"{asked:g}" + ("" if both.ratio[0] >= asked else ", short")
        ours, rival = both.ours, both.rival
        later = ", more" if workload in workloads.CLOSED and ours.p99_ms > rival.p99_ms else ""
        lines.append([
            f"{workload.name}, {precision}", number(ours.per_s[0]), number(rival.per_s[0]), rival.contender.name,
            _between(both.ratio), wanted, number(ours.p99_ms) + later, number(rival.p99_ms),
        ])  # fmt: skip
    heads = ["workload", "ours /s", "best rival /s", "which", "ours / rival (rounds)", "asked", "p99 ms", "its p99 ms"]
    if not lines:
        return "Ours or the rivals were not measured."
    note = "Requests/s; in the generation workload tokens/s. Best rival: the highest median of the same precision."
    return "\n\n".join(part for part in (note, _table(heads, lines), _generation(found)) if part)


def _generation(found: Sequence[tuple[Workload, str, list[Row]]]) -> str:
    """Ours against transformers' generate."""
    rows = [row for workload, p, rows in found if workload in workloads.GENERATE and p == "fp32" for row in rows]
    both = versus([row for row in rows if row.contender.engine in (OURS, "transformers")])
    if both is None:
        return ""
    short = "" if both.ratio[0] >= OVER_TRANSFORMERS else ", short"
    return f"Generation, of transformers' tokens/s (asked: {OVER_TRANSFORMERS:g}): {_between(both.ratio)}{short}."


def _cell(workload: Workload, rows: Sequence[Row]) -> str:
    unit = "tokens/s" if workload.kind == "generate" else "requests/s"
    lines = []
    for each in rows:
        note = each.note if not each.failures else f"{each.failures} failed: {each.note}"
        figures = [_between(each.per_s), number(each.p50_ms), number(each.p99_ms), str(each.requests)]
        name = f"**{each.contender.name}**" if each.contender.ours else each.contender.name
        lines.append([name, *(figures if each.requests else ["", "", "", "0"]), note.replace("|", "/")[:120]])
    heads = ["contender", f"{unit} (rounds)", "p50 ms", "p99 ms", "answers", ""]
    if not any(line[-1] for line in lines):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    return _table(heads, lines)


def _rates(visits: Visits, workload: Workload, precision: str) -> str:
    if workload.kind != "open":
        return ""
    rates = {r["rate"] for r in visits.of(workload) if r["rate"] and f"-{precision}" in r["contender"]}
    return f": {', '.join(f'{rate:g}' for rate in sorted(rates))}/s"


def _overhead(visits: Visits, contenders: Sequence[Contender]) -> str:
    """p50 of one caller against the session's own run time."""
    lines = []
    for contender in contenders:
        records = [r for r in visits.of(workloads.CLOSED[0]) if r["contender"] == contender.name and r["infer_ms"]]
        if not records:
            continue
        p50 = float(np.median([ms for r in records for ms in r["latency_ms"]]))
        infer = float(np.median([ms for r in records for ms in r["infer_ms"]]))
        verdict = "" if p50 - infer <= OVER_INFER_MS else ", more"
        lines.append([contender.name, number(p50), number(infer), number(p50 - infer) + verdict])
    if not lines:
        return ""
    heads = ["64 tokens, 1 caller", "p50 ms", "session's own run ms", f"over it (asked: {OVER_INFER_MS} at most)"]
    return f"## What the service adds\n\n{_table(heads, lines)}"


def _turned(visits: Visits) -> str:
    """Six variants in turn against one at a time."""
    alone, turn = ({r["round"]: r for r in visits.of(w) if not r["skipped"]} for w in workloads.TURNS)
    shared = [n for n in alone.keys() & turn.keys() if alone[n]["per_s"]]
    if not shared:
        return ""
    ratio = spread([turn[n]["per_s"] / alone[n]["per_s"] for n in shared])
    lines = [
        [workload.name, _between(spread([records[n]["per_s"] for n in shared]))]
        for workload, records in zip(workloads.TURNS, (alone, turn), strict=True)
    ]
    short = "" if ratio[0] >= 1 - TURNS_COST else ", short"
    lines.append([f"ratio (asked: {1 - TURNS_COST:g} at least)", _between(ratio) + short])
    heads = ["6 variants of that shape in one server, fp32, 64 tokens, 8 callers", "requests/s (rounds)"]
    return f"## Six variants\n\n{_table(heads, lines)}"


def _servers(visits: Visits, contenders: Sequence[Contender], facts: dict[str, Any]) -> str:
    lines = []
    for contender in contenders:
        about = facts["servers"].get(contender.name, {})
        peak = max((r.get("resident_mb", 0.0) for r in visits.records if r["contender"] == contender.name), default=0.0)
        deviation = about.get("deviation")
        lines.append([
            contender.name, number(about["resident_mb"]) if about else "", number(peak),
            number(about["start_s"]) if about else "", f"{deviation['worst']:.1e}" if deviation else "",
            f"{deviation['mean']:.1e}" if deviation else "",
        ])  # fmt: skip
    heads = [
        "contender", "resident MB at start", "highest after a visit", "start to ready s, warm files",
        "worst ln p off", "mean ln p off",
    ]  # fmt: skip
    return (
        "Off: |ln p - ln transformers' p in float64| over the likeliest tokens of 6 prompts. Resident: all processes "
        f"of a server, shared pages in each.\n\n{_table(heads, lines)}"
    )


def _settings(contenders: Sequence[Contender]) -> str:
    found: dict[str, list[str]] = {}
    for contender in contenders:
        found.setdefault(contender.described, []).append(contender.name)
    return "\n".join(f"- {described}: {', '.join(names)}" for described, names in found.items())


def _ceiling(measured: Sequence[Record]) -> str:
    lines = [
        [str(r["callers"]), number(r["per_s"]), number(float(np.median(r["latency_ms"]))),
         number(1e3 * r["client_cpu_s"] / (len(r["latency_ms"]) or 1))]
        for r in measured
    ]  # fmt: skip
    heads = ["callers", "requests/s", "p50 ms", "client's processor ms per request"]
    return f"The client against a server that does nothing:\n\n{_table(heads, lines)}" if lines else ""


def _disturbed(visits: Visits) -> str:
    others = [r["others_cores"] for r in visits.records if "others_cores" in r]
    if not others or float(np.median(others)) <= QUIET_CORES:
        return ""
    return f"**The machine was not quiet: other processes took {np.median(others):.2f} cores in the median visit.**"


def _quiet(visits: Visits) -> str:
    others = [r["others_cores"] for r in visits.records if "others_cores" in r]
    if not others:
        return ""
    p50, p95 = np.percentile(others, [50, 95])
    return f"Cores taken by other processes while a contender was measured: median {p50:.2f}, p95 {p95:.2f}."


def draw(visits: Visits, contenders: Sequence[Contender], path: Path) -> None:
    """Requests/s of each engine's better setting: a panel for each workload and precision."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "actuary", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    found = [each for each in tables(visits, contenders) if each[0].kind in DRAWN]
    names = list(dict.fromkeys(workload.name for workload, _, _ in found))
    if not names:
        return
    figure, panels = pyplot.subplots(len(names), len(PRECISIONS), figsize=(9, 1.35 * len(names)), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for workload, precision, rows in found:
        axes = panels[names.index(workload.name)][PRECISIONS.index(precision)]
        axes.axis("on")
        best: dict[str, Row] = {}
        for each in rows:  # the fastest first
            best.setdefault(each.contender.engine, each)
        shown = [each for each in reversed(best.values()) if each.requests]
        middle = [each.per_s[0] for each in shown]
        reach = [[each.per_s[0] - each.per_s[1] for each in shown], [each.per_s[2] - each.per_s[0] for each in shown]]
        colours = ["#c0392b" if each.contender.engine == OURS else "#7f8c8d" for each in shown]
        axes.barh([each.contender.engine for each in shown], middle, xerr=reach, color=colours, ecolor="#2c3e50")
        for at, each in enumerate(shown):
            axes.text(each.per_s[2], at, f" {number(each.per_s[0])}", va="center")
        axes.margins(x=0.15)
        unit = "tokens/s" if workload.kind == "generate" else "requests/s"
        axes.set_title(f"{workload.name}, {precision}: {unit}", loc="left", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
