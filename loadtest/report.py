"""One HTML file of a run of load, and its words: the page of `page.py` with this run's figures and table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from loadtest import page
from loadtest.page import colour, figure, line, log_ticks, ms
from loadtest.samples import Sample

DOTS = 1200  # samples drawn per variant over time; the slowest are among them
FEW = 1000  # a p99 of fewer answers rests on fewer than ten of them


HEADINGS = ("variant", "requests", "failures", "req/s", "p50", "p90", "p99", "mean", "infer p50")


def cells(row: dict[str, Any]) -> list[str]:
    """What stands under HEADINGS."""
    latencies = [ms(row["latency_ms"][name]) for name in ("p50", "p90", "p99", "mean")]
    counts = [str(row["requests"]), str(row["failures"]), f"{row['requests_per_s']:.1f}"]
    return [row["model"], *counts, *latencies, ms(row["server_ms"]["infer"]["p50"])]


def headline(result: dict[str, Any]) -> str:
    plan = result["plan"]
    how = f"{plan['users']} users" if plan["rate"] is None else f"{plan['rate']:g} arrivals/s, {plan['users']} users"
    return f"{how}, {result['window_s']:g} s on {result['url']}"


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting a figure."""
    said = list(result["client"]["said"])
    if result["interrupted"]:
        said.append(f"interrupted: {result['window_s']:g} s of {result['plan']['duration_s']:g} s were measured")
    few = [row["model"] for row in result["rows"] if 0 < row["requests"] - row["failures"] < FEW]
    if few:
        whom = "each variant" if len(few) == len(result["rows"]) else ", ".join(few)
        said.append(f"fewer than {FEW} answers of {whom}: p99 rests on fewer than ten of them")
    return said


def draw(result: dict[str, Any], samples: Sequence[Sample]) -> str:
    """The report of `result`, as summed up from `samples`."""
    good = {row["model"]: [s for s in samples if s.model == row["model"] and not s.failure] for row in result["rows"]}
    charts = [
        (
            "How long answers take",
            "Share of answers that took at most so long. Further left is faster; the axis is logarithmic.",
            page.ecdf({model: np.array([s.corrected_ms for s in samples]) for model, samples in good.items()}),
        ),
        (
            "Latency over time",
            f"Line: median of each second. Dots: up to {DOTS} answers per variant, the slowest among them.",
            _over_time(good),
        ),
        ("Answers per second", "That went well, by the second in which they were sent.", _rate(result, good)),
        (
            "Where the time goes",
            "Mean time of one answer. Queue, tokenize and infer are the server's own figures; the rest is "
            "HTTP, scheduling and the network"
            + (", and waiting for a free user" if result["plan"]["rate"] else "")
            + ".",
            _parts(result),
        ),
    ]
    return page.page(
        kind="load",
        headline=headline(result),
        lead="Next-token requests, one row per variant. "
        + result["started"].replace("T", " ").replace("+00:00", " UTC"),
        top=page.notes(notes(result)) + f'<section class="card table">{_table(result)}</section>',
        cards=[page.card(title, said, page.chart(drawn, f"chart{i}")) for i, (title, said, drawn) in enumerate(charts)],
        facts=_about(result),
    )


def _over_time(good: dict[str, list[Sample]]) -> go.Figure:
    drawn = figure("seconds since the load began", "latency, ms", hovermode="closest")
    pick = np.random.default_rng(0)
    every: list[np.ndarray] = []
    for index, (model, samples) in enumerate(good.items()):
        if not samples:
            continue
        at_s = np.array([sample.planned_s for sample in samples])
        values = np.array([sample.corrected_ms for sample in samples])
        every.append(values)
        slowest = np.argsort(values)[-DOTS // 10 :]
        others = pick.permutation(len(values))[: DOTS - len(slowest)]
        dots = np.unique(np.concatenate([slowest, others]))
        drawn.add_scatter(
            x=at_s[dots].round(3),
            y=values[dots].round(3),
            mode="markers",
            marker={"size": 3, "opacity": 0.35, "color": colour(index)},
            legendgroup=model,
            showlegend=False,
            hovertemplate=f"{html.escape(model)}: %{{y:.2f}} ms at %{{x:.2f}} s<extra></extra>",
        )
        seconds = np.floor(at_s).astype(int)
        ticks = np.unique(seconds)
        medians = [float(np.median(values[seconds == second])) for second in ticks]
        drawn.add_scatter(
            x=ticks + 0.5,
            y=medians,
            name=model,
            mode="lines",
            line=line(index),
            legendgroup=model,
            hovertemplate="median %{y:.2f} ms",
        )
    if every:
        drawn.update_yaxes(**log_ticks(np.concatenate(every)))
    return drawn


def _rate(result: dict[str, Any], good: dict[str, list[Sample]]) -> go.Figure:
    drawn = figure("seconds since the load began", "answers per second", hovermode="x unified")
    begin = result["plan"]["warmup_s"]
    # Whole seconds only: half a second at the end would look like a fall.
    edges = begin + np.arange(0, int(result["window_s"]) + 1)
    for index, (model, samples) in enumerate(good.items()):
        at_s = [sample.planned_s for sample in samples]
        counts, _ = np.histogram(at_s, bins=edges) if len(edges) > 1 else (np.array([]), edges)
        drawn.add_scatter(
            x=edges[:-1] + 0.5,
            y=counts,
            name=model,
            mode="lines+markers" if len(counts) < 30 else "lines",
            line=line(index),
            hovertemplate="%{y}/s",
        )
    drawn.update_yaxes(rangemode="tozero")
    return drawn


def _parts(result: dict[str, Any]) -> go.Figure:
    rows = [row for row in result["rows"] if row["latency_ms"]["mean"] is not None]
    parts = {part: [row["server_ms"][part]["mean"] or 0.0 for row in rows] for part in ("queue", "tokenize", "infer")}
    server_ms = [sum(times) for times in zip(*parts.values(), strict=True)]
    parts["the rest"] = [
        max(row["latency_ms"]["mean"] - known, 0.0) for row, known in zip(rows, server_ms, strict=True)
    ]
    return page.stacked("mean, ms", [row["model"] for row in rows], parts)


def _table(result: dict[str, Any]) -> str:
    lines = []
    for row in [*result["rows"], result["total"]]:
        lines.append(page.row(cells(row)))
        why = "; ".join(f"{count} × {reason}" for reason, count in row["failure_reasons"].items())
        if why and row is not result["total"]:
            lines.append(f'<tr class="why"><td colspan="{len(HEADINGS)}">{html.escape(why)}</td></tr>')
    return page.table(HEADINGS, lines)


def _about(result: dict[str, Any]) -> dict[str, str]:
    machine, plan, client = result["machine"], result["plan"], result["client"]
    late = client["late_ms"]
    return {
        "Repeat it": f"<code>{html.escape(result['command'])}</code>",
        "Load": html.escape(
            f"{client['mode']}; warm-up of {plan['warmup_s']:g} s discarded; prompts: {plan['prompts']}; "
            f"top_k {plan['top_k']}; seed {plan['seed']}"
        ),
        "Load generator": html.escape(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
            + (f"; used {client['cpu_share']:.0%} of a core" if client["cpu_share"] is not None else "")
            + (f"; late by p50 {ms(late['p50'])}, p99 {ms(late['p99'])} ms" if plan["rate"] else "")
        ),
        "Versions": html.escape(", ".join(f"{name} {number}" for name, number in result["versions"].items())),
        "Figures": html.escape(
            f"latency in ms from {'the planned send' if plan['rate'] else 'the send'} to the last byte, "
            f"of answers that went well; percentiles by {result['percentile_method']} interpolation; "
            f"{result['total']['requests']} samples in samples.csv"
        ),
    }
