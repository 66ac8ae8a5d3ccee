"""A comparison's folder -> report.html, which opens without a network, and report.md: the same words and tables.

The order is that of a reader's questions: may I trust it, who is slower, what does that buy, where does the time
go, what exactly was run. Figures are in `charts.py`, words and tables in `words.py`, the picture of quality against
latency in `frontier.py`; the page is the one that `actuary load` has.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl

from loadtest import page
from loadtest.compare import against, charts, frontier, words
from loadtest.compare.design import AGAIN
from loadtest.compare.store import Run
from loadtest.compare.words import Table
from loadtest.page import ms
from loadtest.shared import write

NAME = "report"  # .html and .md
VOID = 20  # void blocks that the table names; all of them are in rounds/*.json


@dataclass(frozen=True)
class Section:
    title: str
    said: str
    figure: go.Figure | None = None
    table: Table | None = None


def write_files(
    folder: Path, run: Run, result: Mapping[str, Any], found: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draws `run`, judged as `result`, into its folder; with `found`, of `against.compare`, under a name of its own."""
    parts = sections(run, result)
    name = NAME
    if found:
        parts.insert(0, _against(found))
        name = f"against-{found['old']}"
    files = {f"{name}.html": draw(run, result, parts), f"{name}.md": markdown(run, result, parts)}
    for file, text in files.items():
        write(folder / file, text)
    return [folder / file for file in files]


def sections(run: Run, result: Mapping[str, Any]) -> list[Section]:
    """Of `result`, the verdict over the run's blocks."""
    arms = words.arms_of(run.run)
    latencies = charts.latencies(run.samples, run.blocks, arms)
    return [
        _differences(run, result),
        _frontier(run.run, result, run.blocks),
        Section(
            "How long answers take",
            "Share of answers that took at most so long, each arm over the whole run. Further left is faster; the axis "
            "is logarithmic. The verdict does not come from here but from pairs of blocks.",
            page.ecdf({words.name_of(arm): values for arm, values in latencies.items()}),
            words.quantiles_table(latencies),
        ),
        *_sweep(result, arms),
        _time_line(run.blocks, arms),
        *_server(run.blocks, arms),
        *_ffn(result),
        *_cold(run, arms),
        Section("What was compared", words.widths(run.run), None, words.facts_table(run.run)),
    ]


def _against(found: Mapping[str, Any]) -> Section:
    rows = [(arm["model"], arm["outcome"], *map(words.interval, (arm["then"], arm["now"], arm["p50"])))
            for arm in found["arms"]]  # fmt: skip
    rows.append((words.name_of(found["baseline"] + AGAIN), "check", "", "", words.interval(found["aa"])))
    return Section(
        f"Against {found['old']}",
        against.said(found),
        charts.forest(found, "p50 now over then, %"),
        Table(("variant", "outcome", f"then, over {found['baseline']}", "now", "now over then"), tuple(rows)),
    )


def _differences(run: Run, result: Mapping[str, Any]) -> Section:
    margin, sure, base = result["margin"] * 100, (1 - result["alpha"]) * 100, result["baseline"]
    return Section(
        f"Over {base}",
        f"p50 of each arm over {base}'s two blocks in the same round; to the right is slower. The intervals hold "
        f"together, and at every look, at {sure:g} %. One that lies within the shaded {margin:g} % shows no difference "
        "that matters. p50 and the server's own times are of a typical block; p90, p99, mean, answers, tokens and CPU "
        f"are of all answers together, with the rare slow ones. {base}'s own row is the median of its blocks.",
        charts.forest(result, f"p50 over {base}, %"),
        words.arms_table(run.run, result, run.blocks),
    )


def _frontier(run: Mapping[str, Any], result: Mapping[str, Any], blocks: pl.DataFrame) -> Section:
    title = "What quality costs"
    points, why_not = frontier.points(run, result)
    baseline = result["baseline"]
    p50 = words.medians(blocks, ["p50_ms"]).get(baseline, {}).get("p50_ms")
    if not points or p50 is None:
        return Section(title, why_not or f"{baseline} was never answered well, so there is no latency to draw.")
    doubt = "" if result["fit"] else "The latencies are not to be trusted, as said at the top."
    unsettled = [arm["model"] for arm in result["arms"] if arm["outcome"] == "inconclusive"]
    if unsettled and result["fit"]:
        doubt = f"How far to the left or right is not settled of {', '.join(unsettled)}."
    return Section(
        title,
        f"{frontier.said(points, frontier.unknown(run, points))} {doubt}".strip(),
        charts.quality_against_latency(points, words.arms_of(run), baseline, p50),
        frontier.table(points, baseline, p50),
    )


def _sweep(result: Mapping[str, Any], arms: Sequence[str]) -> list[Section]:
    if not result.get("sweep"):
        return []

    def per_s(value: float | None) -> str:
        return "not reached" if value is None else f"{value:.4g}"

    rows = []
    for arm in arms:
        knee, best = result["knee"].get(arm), result["goodput"].get(arm)
        if knee and best:
            interval = f"{per_s(knee['low'])} to {per_s(knee['high'])}"
            if knee.get("few"):
                interval = "too few blocks"
            rows.append(
                (words.name_of(arm), per_s(knee["rate"]), interval, f"{best['per_s']:.4g} at {best['rate']:g}/s")
            )
    asked = "asked for" if result["objective_given"] else "5 times the baseline's idle p50, since none was asked for"
    return [
        Section(
            "Latency against rate",
            "Solid: p99, dotted: p50. The knee is the highest rate at which p99, from the planned time, stays within "
            f"{ms(result['objective_ms'])} ms ({asked}); good answers are within it. Crosses: the plan was not kept. "
            "Blocks are short, so just above what a variant carries its queue has little time to grow.",
            charts.latency_against_rate(result, arms),
            Table(("arm", "knee, /s", "95 % interval", "most good answers /s"), tuple(rows)),
        )
    ]


def _time_line(blocks: pl.DataFrame, arms: Sequence[str]) -> Section:
    void = blocks.filter(pl.col("void") != "")
    rows = [(str(n), words.name_of(arm), why) for n, arm, why in void.select("round", "arm", "void").rows()]
    shown = [*rows[:VOID], ("…", f"and {len(rows) - VOID} more", "")] if len(rows) > VOID else rows
    return Section(
        "Block by block",
        "Each mark is one block. What slows all arms of a round alike, the grey line, cancels in the differences. "
        + (
            f"{len(rows)} void block{'s are' if len(rows) > 1 else ' is'} crossed out, and with each its whole round."
            if rows
            else "No block was void."
        ),
        charts.time_line(blocks, arms),
        Table(("round", "arm", "why it is void"), tuple(shown)) if rows else None,
    )


def _server(blocks: pl.DataFrame, arms: Sequence[str]) -> list[Section]:
    drawn = charts.server_beside_client(blocks, arms)
    if drawn is None:
        return []
    figure, rows = drawn
    cells = tuple((words.name_of(arm), *(ms(value) for value in times)) for arm, times in rows)
    return [
        Section(
            "Where the time goes",
            "Medians. Queue, tokenize and infer are the server's own times; the rest of p50 is HTTP, scheduling and "
            "the network. What the activation costs is in infer.",
            figure,
            Table(("arm", "queue", "tokenize", "infer", "the rest", "p50"), cells),
        )
    ]


def _ffn(result: Mapping[str, Any]) -> list[Section]:
    shares = result.get("ffn_share")
    if not shares:
        return []
    rows = [
        (model, *(f"{its[part]:.1%}" for part in ("ffn", "activation", "attention", "head", "other")))
        for model, its in shares.items()
    ]
    return [
        Section(
            "The feed-forward blocks' share",
            "Of the model's own run on one core, by ONNX Runtime's profile: no activation can save more than the "
            "blocks take, and none costs less than its own part.",
            charts.ffn_share(shares),
            Table(("variant", "feed-forward", "of it the activation", "attention", "head", "other"), tuple(rows)),
        )
    ]


def _cold(run: Run, arms: Sequence[str]) -> list[Section]:
    """The discarded warm-up: what the first who ask have to wait."""
    if not run.warmup:
        return []
    first = {visit["arm"]: visit for visit in run.warmup[0]["visits"]}
    blocks = words.medians(run.blocks, ["p50_ms"])
    rows = [
        (words.name_of(arm), ms(first[arm]["first_ms"]), ms(first[arm]["p50_ms"]), ms(blocks[arm]["p50_ms"]))
        for arm in arms
        if arm in first and arm in blocks
    ]
    return [
        Section(
            "Cold and warm",
            "The first visit of each arm after the start of the load is in none of the other figures. One visit each, "
            "so these are single measurements.",
            None,
            Table(("arm", "first answer, ms", "p50 of the first visit", "p50 of its blocks"), tuple(rows)),
        )
    ]


def about(run: Run) -> dict[str, str]:
    """What it takes to repeat the comparison, in plain text; the first is a command."""
    record, design = run.run, run.run["design"]
    shown = ["block_s", "settle_s", "minutes", "users", "cycle", "seed", "timeout_s", "fixed"]
    shown += ["rate", "arrivals"] if words.planned(design) else []
    return {
        "Repeat it": record["command"],
        "Design": "blocks in Williams' order, " + _pairs({name: design.get(name) for name in shown}),
        "Workload": words.workload(record),
        "Server": "its own, started and stopped by the comparison" if record["own_server"] else record["url"],
        "Machine": _pairs(record["machine"]),
        "Versions": _pairs(record["versions"]),
        "Figures": (
            f"latency in ms from {'the planned send' if words.planned(design) else 'the send'} to the last byte, of "
            "answers that went well; raw samples in rounds/*.parquet, the verdict in result.json, the bundles' sha256 "
            "in full in run.json"
        ),
    }


def _pairs(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in record.items() if value not in (None, "", [], ()))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw(run: Run, result: Mapping[str, Any], parts: Sequence[Section]) -> str:
    """The page."""
    facts = {name: html.escape(said) for name, said in about(run).items()}
    facts["Repeat it"] = f"<code>{facts['Repeat it']}</code>"
    unfit = words.unfit(result)
    return page.page(
        kind="compare",
        alarm=f'<p class="alarm">{html.escape(unfit)}</p>' if unfit else "",
        headline=words.headline(result),
        lead=words.lead(run.run, result),
        top=page.notes(words.notes(run.run, result)) + _verdict(result),
        cards=[
            page.card(part.title, part.said, _inside(part, i), wide=part.figure is None) for i, part in enumerate(parts)
        ],
        facts=facts,
    )


def _verdict(result: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<li><b class="{outcome}">{outcome}</b> {html.escape(sentence)}</li>'
        for outcome, sentence in words.sentences(result)
    )
    return (
        f'<section class="card table"><h2>Verdict</h2><ul class="verdict">{lines}</ul>'
        f"<p>{html.escape(words.aa(result))}</p></section>"
    )


def _inside(part: Section, index: int) -> str:
    table = page.table(part.table.headings, [page.row(cells) for cells in part.table.rows]) if part.table else ""
    if part.figure is None:
        return table
    folded = f"<details><summary>As a table</summary>{table}</details>" if table else ""
    return page.chart(part.figure, f"chart{index}") + folded


def markdown(run: Run, result: Mapping[str, Any], parts: Sequence[Section]) -> str:
    """The twin of the page: its words and tables, without its pictures."""
    unfit = words.unfit(result)
    lines = [f"> **{unfit}**", ""] if unfit else []
    lines += [f"# {_md(words.headline(result))}", "", _md(words.lead(run.run, result)), ""]
    lines += [f"> {_md(note)}\n" for note in words.notes(run.run, result)]
    lines += ["## Verdict", ""]
    lines += [f"- **{outcome}** {_md(sentence)}" for outcome, sentence in words.sentences(result)]
    lines += ["", _md(words.aa(result)), ""]
    for part in parts:
        lines += [f"## {_md(part.title)}", ""]
        lines += [_md(part.said), ""] if part.said else []
        lines += [*_md_table(part.table), ""] if part.table else []
    facts = about(run)
    lines += ["## To repeat it", "", "```sh", facts.pop("Repeat it"), "```", ""]
    lines += [f"- {name}: {_md(said)}" for name, said in facts.items()]
    return "\n".join(lines) + "\n"


def _md_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_md, cells))} |"

    return [line(table.headings), f"|---|{'---:|' * (len(table.headings) - 1)}", *map(line, table.rows)]


def _md(text: str) -> str:
    """Names may hold what Markdown reads as its own."""
    for sign in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text
