"""One HTML file of a run of load, which opens without a network, in light and dark; and its words.

Drawn with plotly, whose script is written into the file. The page is `report.html`: its colours are CSS
variables, and a few lines of script give the charts those same colours, now and whenever the reader's
scheme changes.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from loadtest.samples import Sample

_PAGE = Path(__file__).with_suffix(".html")

# Readable on white and on near black, and told apart by the colour-blind (after Tol's muted set).
COLOURS = (
    "#3b8bd0",
    "#e0782f",
    "#3fa36b",
    "#c65b9a",
    "#8f7ae0",
    "#b5962b",
    "#2fa7b0",
    "#d1585c",
    "#8a8f98",
    "#7aa63a",
)
ECDF_POINTS = 800  # of evenly spaced quantiles; the tail above the last is drawn whole
DOTS = 1200  # samples drawn per variant over time; the slowest are among them
FEW = 1000  # a p99 of fewer answers rests on fewer than ten of them


HEADINGS = ("variant", "requests", "failures", "req/s", "p50", "p90", "p99", "mean", "infer p50")


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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
            _ecdf(good),
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
    cards = "\n".join(
        f'<section class="card"><h2>{html.escape(title)}</h2><p>{html.escape(said)}</p>'
        + figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart{i}", config=_CONFIG)
        + "</section>"
        for i, (title, said, figure) in enumerate(charts)
    )
    remarks = "".join(f"<li>{html.escape(note)}</li>" for note in notes(result))
    return string.Template(_PAGE.read_text(encoding="utf-8")).substitute(
        headline=html.escape(headline(result)),
        started=html.escape(result["started"].replace("T", " ").replace("+00:00", " UTC")),
        notes=f'<ul class="notes">{remarks}</ul>' if remarks else "",
        table=_table(result),
        cards=cards,
        about=_about(result),
        plotly=get_plotlyjs(),
    )


def _figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template=None,
        height=380,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"namelength": -1},
        **layout,
    )
    figure.update_xaxes(title_text=x_title, zeroline=False, automargin=True)
    figure.update_yaxes(title_text=y_title, zeroline=False, automargin=True)
    return figure


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _log_ticks(values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis whose ticks are named in full: 1, 2, 5 of each decade, or more where it is short."""
    low, high = max(float(values.min()) * 0.9, 1e-3), float(values.max()) * 1.1
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    digits = (1, 2, 5) if high > 12 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
    inside = [tick for tick in ticks if low <= tick <= high]
    return {
        "type": "log",
        "range": [float(np.log10(low)), float(np.log10(high))],
        "tickvals": inside,
        "ticktext": [f"{tick:g}" for tick in inside],
    }


def _ecdf(good: dict[str, list[Sample]]) -> go.Figure:
    figure = _figure("latency, ms", "share of answers", hovermode="closest")
    everything = [np.sort([sample.corrected_ms for sample in samples]) for samples in good.values()]
    for index, (model, values) in enumerate(zip(good, everything, strict=True)):
        count = len(values)
        if not count:
            continue
        shares = np.arange(1, count + 1) / count
        if count > 2 * ECDF_POINTS:
            body = np.linspace(0, count - ECDF_POINTS, ECDF_POINTS).astype(int)
            kept = np.unique(np.concatenate([body, np.arange(count - ECDF_POINTS, count)]))
            values, shares = values[kept], shares[kept]
        figure.add_scatter(
            x=values,
            y=shares,
            name=model,
            mode="lines",
            line={"shape": "hv", "width": 2, "color": _colour(index)},
            hovertemplate="%{y:.1%} within %{x:.2f} ms",
        )
    if any(len(values) for values in everything):
        figure.update_xaxes(**_log_ticks(np.concatenate(everything)))
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def _over_time(good: dict[str, list[Sample]]) -> go.Figure:
    figure = _figure("seconds since the load began", "latency, ms", hovermode="closest")
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
        figure.add_scatter(
            x=at_s[dots].round(3),
            y=values[dots].round(3),
            mode="markers",
            marker={"size": 3, "opacity": 0.35, "color": _colour(index)},
            legendgroup=model,
            showlegend=False,
            hovertemplate=f"{html.escape(model)}: %{{y:.2f}} ms at %{{x:.2f}} s<extra></extra>",
        )
        seconds = np.floor(at_s).astype(int)
        ticks = np.unique(seconds)
        medians = [float(np.median(values[seconds == second])) for second in ticks]
        figure.add_scatter(
            x=ticks + 0.5,
            y=medians,
            name=model,
            mode="lines",
            line={"width": 2, "color": _colour(index)},
            legendgroup=model,
            hovertemplate="median %{y:.2f} ms",
        )
    if every:
        figure.update_yaxes(**_log_ticks(np.concatenate(every)))
    return figure


def _rate(result: dict[str, Any], good: dict[str, list[Sample]]) -> go.Figure:
    figure = _figure("seconds since the load began", "answers per second", hovermode="x unified")
    begin = result["plan"]["warmup_s"]
    # Whole seconds only: half a second at the end would look like a fall.
    edges = begin + np.arange(0, int(result["window_s"]) + 1)
    for index, (model, samples) in enumerate(good.items()):
        at_s = [sample.planned_s for sample in samples]
        counts, _ = np.histogram(at_s, bins=edges) if len(edges) > 1 else (np.array([]), edges)
        figure.add_scatter(
            x=edges[:-1] + 0.5,
            y=counts,
            name=model,
            mode="lines+markers" if len(counts) < 30 else "lines",
            line={"width": 2, "color": _colour(index)},
            hovertemplate="%{y}/s",
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def _parts(result: dict[str, Any]) -> go.Figure:
    rows = [row for row in result["rows"] if row["latency_ms"]["mean"] is not None][::-1]
    names = [row["model"] for row in rows]
    figure = _figure("mean, ms", "", barmode="stack")
    rest = np.array([row["latency_ms"]["mean"] for row in rows])
    for part, colour in (("queue", "#b5962b"), ("tokenize", "#8f7ae0"), ("infer", "#3b8bd0")):
        means = np.array([row["server_ms"][part]["mean"] or 0.0 for row in rows])
        rest = rest - means
        figure.add_bar(
            y=names,
            x=means,
            name=part,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{x:.2f} ms",
        )
    figure.add_bar(
        y=names,
        x=np.maximum(rest, 0),
        name="the rest",
        orientation="h",
        marker={"color": "#8a8f98"},
        hovertemplate="%{x:.2f} ms",
    )
    figure.update_layout(height=130 + 34 * max(len(rows), 1), bargap=0.35, legend_traceorder="normal")
    figure.update_yaxes(type="category")
    return figure


def _table(result: dict[str, Any]) -> str:
    lines = []
    for row in [*result["rows"], result["total"]]:
        name, *numbers = map(html.escape, cells(row))
        why = "; ".join(f"{count} × {reason}" for reason, count in row["failure_reasons"].items())
        lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in numbers)}</tr>")
        if why and row is not result["total"]:
            lines.append(f'<tr class="why"><td colspan="{len(HEADINGS)}">{html.escape(why)}</td></tr>')
    heads = "".join(f"<th>{name}</th>" for name in HEADINGS)
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _about(result: dict[str, Any]) -> str:
    machine, plan, client = result["machine"], result["plan"], result["client"]
    late = client["late_ms"]
    facts = {
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
    return "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in facts.items())


_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
