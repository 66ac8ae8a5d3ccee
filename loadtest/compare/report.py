"""A comparison's folder -> report.html, which opens without a network, and report.md: the same words and tables.

The order is that of a reader's questions: may I trust it, who is slower, what does that buy, where does the time
go, what exactly was run. Figures are in `charts.py`, words and tables in `words.py`, the picture of quality against
latency in `frontier.py`; the page is the one that `actuary load` has.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from loadtest import page
from loadtest.compare import charts, frontier, words
from loadtest.compare.words import Table
from loadtest.page import ms


@dataclass(frozen=True)
class Section:
    title: str
    said: str
    figure: go.Figure | None = None
    table: Table | None = None


def sections(
    run: Mapping[str, Any], result: Mapping[str, Any], blocks: pl.DataFrame, samples: pl.LazyFrame
) -> list[Section]:
    """Of `result`, the verdict over `blocks`, which sum up `samples`."""
    arms = words.arms_of(run)
    latencies = charts.latencies(samples, blocks, arms)
    return [
        _differences(result, blocks),
        _frontier(run, result, blocks),
        Section(
            "How long answers take",
            "Share of answers that took at most so long, each arm over the whole run. Further left is faster; the axis "
            "is logarithmic. The verdict does not come from here but from pairs of blocks.",
            page.ecdf({words.name_of(arm): values for arm, values in latencies.items()}),
            words.quantiles_table(latencies),
        ),
        *_sweep(result),
        _time_line(blocks, arms),
        *_server(blocks, arms),
        *_ffn(result),
        Section("What was compared", words.widths(run, result), None, words.facts_table(run, result)),
    ]


def _differences(result: Mapping[str, Any], blocks: pl.DataFrame) -> Section:
    margin, sure = result["margin"] * 100, (1 - result["alpha"]) * 100
    return Section(
        f"Over {result['baseline']}",
        f"p50 of each arm over {result['baseline']}'s in the same round, with its {sure:g} % interval; to the right is "
        f"slower. An interval within the shaded {margin:g} % counts as no difference that matters.",
        charts.forest(result),
        words.arms_table(result, blocks),
    )


def _frontier(run: Mapping[str, Any], result: Mapping[str, Any], blocks: pl.DataFrame) -> Section:
    title = "What quality costs"
    points, why_not = frontier.points(run, result)
    baseline = result["baseline"]
    p50 = words.medians(blocks, ["p50_ms"]).get(baseline, {}).get("p50_ms")
    if not points or p50 is None:
        return Section(title, why_not or f"{baseline} was never answered well, so there is no latency to draw.")
    return Section(
        title,
        frontier.said(points, frontier.unknown(run, points)),
        charts.quality_against_latency(points, words.arms_of(run), baseline, p50),
        frontier.table(points, baseline, p50),
    )


def _sweep(result: Mapping[str, Any]) -> list[Section]:
    return []


def _time_line(blocks: pl.DataFrame, arms: Sequence[str]) -> Section:
    void = blocks.filter(pl.col("void") != "")
    rows = [(str(n), words.name_of(arm), why) for n, arm, why in void.select("round", "arm", "void").rows()]
    return Section(
        "Block by block",
        "Each mark is one block. What slows all arms of a round alike, the grey line, cancels in the differences. "
        + (
            f"{len(rows)} void block{'s are' if len(rows) > 1 else ' is'} crossed out, and with each its whole round."
            if rows
            else "No block was void."
        ),
        charts.time_line(blocks, arms),
        Table(("round", "arm", "why it is void"), tuple(rows)) if rows else None,
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
    return [
        Section(
            "The feed-forward blocks' share",
            "Of the model's own run, by ONNX Runtime's profile: no activation can save more than this.",
            charts.ffn_share(shares),
            Table(("variant", "share of the run"), tuple((name, f"{share:.1%}") for name, share in shares.items())),
        )
    ]


def about(run: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """What it takes to repeat the comparison, in plain text; the first is a command."""
    machine, design, workload = run["machine"], run["design"], run["workload"]
    server = "its own, started and stopped by the comparison" if run["own_server"] else run["url"]
    return {
        "Repeat it": run["command"],
        "Design": _pairs(design),
        "Workload": _pairs(workload),
        "Server": server,
        "Machine": _pairs(machine),
        "Versions": _pairs(run["versions"]),
        "Figures": (
            f"latency in ms from {'the planned send' if design.get('rate') else 'the send'} to the last byte, of "
            "answers that went well; raw samples in rounds/*.parquet, the verdict in result.json, bundles' sha256 in "
            "full in run.json"
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


def draw(run: Mapping[str, Any], result: Mapping[str, Any], parts: Sequence[Section]) -> str:
    """The page."""
    facts = {name: html.escape(said) for name, said in about(run, result).items()}
    facts["Repeat it"] = f"<code>{facts['Repeat it']}</code>"
    unfit = words.unfit(result)
    return page.page(
        kind="compare",
        alarm=f'<p class="alarm">{html.escape(unfit)}</p>' if unfit else "",
        headline=words.headline(run, result),
        lead=words.lead(run, result),
        top=page.notes(words.notes(run, result)) + _verdict(result),
        cards=[page.card(part.title, part.said, _inside(part, i), wide=part.figure is None) for i, part in enumerate(parts)],
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


def markdown(run: Mapping[str, Any], result: Mapping[str, Any], parts: Sequence[Section]) -> str:
    """The twin of the page: its words and tables, without its pictures."""
    unfit = words.unfit(result)
    lines = [f"> **{unfit}**", ""] if unfit else []
    lines += [f"# {_md(words.headline(run, result))}", "", _md(words.lead(run, result)), ""]
    lines += [f"> {_md(note)}\n" for note in words.notes(run, result)]
    lines += ["## Verdict", ""]
    lines += [f"- **{outcome}** {_md(sentence)}" for outcome, sentence in words.sentences(result)]
    lines += ["", _md(words.aa(result)), ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        lines += [_md(part.said), ""] if part.said else []
        lines += [*_md_table(part.table), ""] if part.table else []
    facts = about(run, result)
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
