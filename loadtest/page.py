"""What all reports share: figures of plotly, and the page that holds them, one HTML file that needs no network.

plotly's script is written into the file. The page is `page.html`: its colours are CSS variables, and a few
lines of script give the charts those same colours, now and whenever the reader's scheme changes.
"""

from __future__ import annotations

import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

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
DASHES = ("solid", "dash", "dot", "dashdot")  # of the lines after the first ten
GREY = "#8a8f98"
PARTS = {"queue": "#b5962b", "tokenize": "#8f7ae0", "infer": "#3b8bd0", "the rest": GREY}  # of an answer's time
ECDF_POINTS = 800  # of evenly spaced quantiles; the tail above the last is drawn whole
_CONFIG = {"responsive": False, "displaylogo": False, "displayModeBar": False}  # the page's own script fits the charts


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> dict[str, Any]:
    """The line of the variant that stands at `index`."""
    return {"width": 2, "color": colour(index), "dash": DASHES[index // len(COLOURS) % len(DASHES)]}


def figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    empty = go.Figure()
    empty.update_layout(
        template=None,
        height=380,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"namelength": -1},
    )
    empty.update_layout(**layout)
    empty.update_xaxes(title_text=x_title, zeroline=False, automargin=True)
    empty.update_yaxes(title_text=y_title, zeroline=False, automargin=True)
    return empty


def log_ticks(values: np.ndarray) -> dict[str, Any]:
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


def ecdf(latencies_ms: Mapping[str, np.ndarray]) -> go.Figure:
    """Share of answers within so many ms, one line per variant."""
    drawn = figure("latency, ms", "share of answers", hovermode="closest")
    for index, (name, latencies) in enumerate(latencies_ms.items()):
        values = np.sort(latencies)
        count = len(values)
        if not count:
            continue
        shares = np.arange(1, count + 1) / count
        if count > 2 * ECDF_POINTS:
            body = np.linspace(0, count - ECDF_POINTS, ECDF_POINTS).astype(int)
            kept = np.unique(np.concatenate([body, np.arange(count - ECDF_POINTS, count)]))
            values, shares = values[kept], shares[kept]
        drawn.add_scatter(
            x=values,
            y=shares,
            name=name,
            mode="lines",
            line={"shape": "hv", **line(index)},
            hovertemplate="%{y:.1%} within %{x:.2f} ms",
        )
    if any(len(values) for values in latencies_ms.values()):
        drawn.update_xaxes(**log_ticks(np.concatenate(list(latencies_ms.values()))))
    drawn.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return drawn


def stacked(
    x_title: str,
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str] = PARTS,
    hover: str = "%{x:.2f} ms",
) -> go.Figure:
    """One bar per name, made of `parts`, each with a value per name."""
    drawn = figure(x_title, "", barmode="stack")
    for part, values in parts.items():
        drawn.add_bar(
            y=list(names)[::-1],  # plotly counts from the bottom
            x=list(values)[::-1],
            name=part,
            orientation="h",
            marker={"color": colours[part]},
            hovertemplate=hover,
        )
    drawn.update_layout(height=130 + 34 * max(len(names), 1), bargap=0.35, legend_traceorder="normal")
    drawn.update_yaxes(type="category")
    return drawn


def chart(drawn: go.Figure, name: str) -> str:
    """The figure as a piece of the page; `name` is its id there."""
    return str(drawn.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=_CONFIG))


def card(title: str, said: str, inside: str, wide: bool = False) -> str:
    css = "card whole" if wide else "card"
    return f'<section class="{css}"><h2>{html.escape(title)}</h2><p>{html.escape(said)}</p>{inside}</section>'


def notes(said: Sequence[str], css: str = "notes") -> str:
    """What a reader must know before trusting a figure; nothing where there is nothing."""
    remarks = "".join(f"<li>{html.escape(note)}</li>" for note in said)
    return f'<ul class="{css}">{remarks}</ul>' if remarks else ""


def table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """`rows` are <tr> already."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: Sequence[str]) -> str:
    name, *others = map(html.escape, cells)
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def about(facts: Mapping[str, str]) -> str:
    """`facts` are HTML already."""
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{said}</dd>" for name, said in facts.items())


def page(
    *, kind: str, headline: str, lead: str, top: str, cards: Sequence[str], facts: Mapping[str, str], alarm: str = ""
) -> str:
    """The whole file. `alarm` stands above everything, `top` above the cards; these, `cards` and `facts` are HTML."""
    return string.Template(_PAGE.read_text(encoding="utf-8")).substitute(
        kind=html.escape(kind),
        alarm=alarm,
        headline=html.escape(headline),
        lead=html.escape(lead),
        top=top,
        cards="\n".join(cards),
        about=about(facts),
        plotly=get_plotlyjs(),
    )
