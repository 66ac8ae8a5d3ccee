"""A chart of a finding -> a drawing, SVG or PNG; the same chart gives the same bytes.

Drawn on opaque white, since a page may be dark; in colours that the colour-blind tell apart (Okabe & Ito 2008); names
stand beside their lines, as far apart as they must.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.study import Chart, Field, Line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333", "#8B5A2B")
INK, FAINT = "#222222", "#d9d9d9"
MARKERS = "osD^vPX*"
STYLE: Any = {
    **matplotlib.rcParamsDefault,
    "svg.hashsalt": "actuary",
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": True,
}
WIDTH, HEIGHT = 7.2, 4.0  # inches
PNG_DPI = 144
BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False, "borderaxespad": 0}  # a legend
FEW = 12  # places on a line that are marked one by one
EARLY = 0.8  # of the axes' width: a line that ends before is named where it ends
LABEL_PT = 10.5  # from one name to the next
POINT_PT = 6.5  # a point's own name
APART = 0.1  # of the axes' width: points that stand further apart are named in columns of their own
MANY = 12  # points of one group
UPRIGHT = 6  # bars; more, or longer names, lie on their side


def draw(chart: Chart | Field, form: Literal["svg", "png"]) -> bytes:
    """The drawing as a file's bytes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        if isinstance(chart, Field):
            _field(figure, axes, chart)
        else:
            _chart(figure, axes, chart)
        axes.set_title(chart.title, pad=10)
        kept = io.BytesIO()
        # Without a date and a version the bytes do not change from run to run.
        nothing = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(kept, format=form, dpi=PNG_DPI, metadata=nothing)
        return kept.getvalue()


def _chart(figure: Figure, axes: Axes, chart: Chart) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_size_inches(WIDTH, max(HEIGHT, 1.2 + len(chart.lines) * LABEL_PT / 72))  # so that all names fit
    if chart.kind == "bars":
        _bars(figure, axes, chart)
        return
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    for index, line in enumerate(chart.lines):
        _line(axes, line, index, chart)
    axes.margins(x=0.02)
    places = sorted({x for line in chart.lines for x in line.x if not isinstance(x, str)})
    if chart.log_x and len(places) <= FEW:
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xticks([], minor=True)
    figure.draw_without_rendering()  # limits and sizes are known from here on
    if any(line.names for line in chart.lines):
        axes.legend(**BESIDE)
        _name_points(axes, chart.lines)
    elif len(chart.lines) > 1 or chart.lines[0].name:
        _name_lines(axes, chart.lines, chart.kind == "lines")


def _line(axes: Axes, line: Line, index: int, chart: Chart) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    x: Any = list(line.x)
    y = _numbers(line.y)
    style: dict[str, Any] = {"color": colour, "zorder": 3, "label": line.name}
    if chart.kind == "points" and not line.dashed:
        low, high = (_numbers(line.y if bound is None else bound) for bound in (line.low, line.high))
        reach = [np.maximum(0, y - low), np.maximum(0, high - y)]
        bars = None if line.low is None and line.high is None else reach
        axes.errorbar(x, y, yerr=bars, fmt=marker, markersize=5, capsize=2.5, linewidth=1.2, **style)
        return
    # A second round of colours is dotted.
    dash = "--" if line.dashed else (":" if index >= len(COLOURS) else "-")
    many = len(chart.lines) > len(COLOURS)
    few: dict[str, Any] = (
        {"marker": marker, "markersize": 4} if len(x) <= FEW and not many and chart.kind == "lines" else {}
    )
    axes.plot(x, y, linestyle=dash, linewidth=1.2 if many else 1.7, **few, **style)
    if line.low is not None and line.high is not None:
        axes.fill_between(x, _numbers(line.low), _numbers(line.high), color=colour, alpha=0.18, linewidth=0)


def _numbers(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _name_lines(axes: Axes, lines: Sequence[Line], marked: bool) -> None:
    """Each name at the right, at the height of its line's end or as near to it as the others let it; where a line ends
    before, its end is named there, and marked where it is one of lines."""
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    ends = []
    for index, line in enumerate(lines):
        y, colour = _numbers(line.y), COLOURS[index % len(COLOURS)]
        there = np.flatnonzero(np.isfinite(y))
        if not len(there):
            continue
        end: Any = (line.x[there[-1]], y[there[-1]])
        across, up = axes.transAxes.inverted().transform(axes.transData.transform(end))
        if across > EARLY:
            ends.append((float(np.clip(up, 0, 1)) * height_pt, index))
            continue
        if marked:
            axes.plot(*end, marker="x", markersize=7, markeredgewidth=2, color=colour, zorder=4)
        beside: Any = {"textcoords": "offset points", "va": "top", "color": colour}
        axes.annotate(line.name, xy=end, xytext=(8, -1), **beside)
    ends.sort()
    places = spread([end for end, _ in ends], LABEL_PT, height_pt)
    for (height, index), place in zip(ends, places, strict=True):
        colour = COLOURS[index % len(COLOURS)]
        axes.annotate(
            lines[index].name, xy=(1.0, height / height_pt), xycoords="axes fraction",
            xytext=(1.045, place / height_pt), textcoords="axes fraction", color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _name_points(axes: Axes, lines: Sequence[Line]) -> None:
    """Each point's own name, in a column right of the points that stand together; of points of one name the first
    line's has it, and what stands above and below at the same x is the same."""
    height_pt = axes.get_window_extent().height * 72 / axes.figure.dpi
    points = [
        (float(across), float(up), name, index)
        for index, line in enumerate(lines)
        for (across, up), name in zip(
            axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([line.x, _numbers(line.y)]))),
            line.names or (),
            strict=False,
        )
        if np.isfinite(up)
    ]
    together: list[list[tuple[float, float, str, int]]] = []
    for point in sorted(points):
        if not together or point[0] - together[-1][-1][0] > APART:
            together.append([])
        together[-1].append(point)
    for group in together:
        column = max(across for across, *_ in group) + 0.03
        first = {name: (across, up, index) for across, up, name, index in sorted(group, key=lambda each: -each[3])}
        named = sorted(first.items(), key=lambda item: (item[1][1], item[0]))
        reach_pt = (named[-1][1][1] - named[0][1][1]) * height_pt
        if len(named) > MANY and reach_pt < len(named) * POINT_PT / 8:
            continue  # one heap, of which the names would fill the chart; the page's table has them
        places = spread([up * height_pt for _, (_, up, _) in named], POINT_PT + 1, height_pt)
        for (name, (across, up, index)), place in zip(named, places, strict=True):
            colour = COLOURS[index % len(COLOURS)]
            axes.annotate(
                name, xy=(across, up), xycoords="axes fraction", xytext=(column, place / height_pt),
                textcoords="axes fraction", color=colour, va="center", fontsize=POINT_PT,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2,
                            "relpos": (0, 0.5)},
            )  # fmt: skip


def spread(wanted: Sequence[float], apart: float, height: float) -> list[float]:
    """Rising places -> places that are `apart` at least and near to them: groups that touch stand about their mean."""
    groups: list[list[float]] = []  # of each: the sum of where its first would stand, how many
    for place in wanted:
        groups.append([place, 1.0])
        while len(groups) > 1:
            (before, n), (last, m) = groups[-2:]
            if before / n + n * apart <= last / m:
                break
            groups[-2:] = [[before + last - m * n * apart, n + m]]
    places = [total / n + i * apart for total, n in groups for i in range(int(n))]
    if not places:
        return places
    over, under = max(0.0, places[-1] - height), max(0.0, -places[0])
    return [place - over + under for place in places]


def _bars(figure: Figure, axes: Axes, chart: Chart) -> None:
    """Side by side for each name; many or long names stand at the left, the first at the top."""
    names = list(dict.fromkeys(str(x) for line in chart.lines for x in line.x))
    lying = len(names) > UPRIGHT or max(map(len, names), default=0) > 14
    thickness = (0.8 if len(chart.lines) > 1 else 0.6) / len(chart.lines)
    if lying:
        figure.set_size_inches(WIDTH, max(HEIGHT * 0.6, 0.9 + len(names) * max(0.22, 0.13 * len(chart.lines))))
    for index, line in enumerate(chart.lines):
        at = [names.index(str(x)) + thickness * (index - (len(chart.lines) - 1) / 2) for x in line.x]
        y = _numbers(line.y)
        low, high = (_numbers(line.y if bound is None else bound) for bound in (line.low, line.high))
        reach: Any = np.nan_to_num(np.array([np.maximum(0, y - low), np.maximum(0, high - y)]))
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "label": line.name, "ecolor": INK}
        style["error_kw"] = {"linewidth": 1, "capsize": 2}
        if line.low is None and line.high is None:
            reach = None
        if lying:
            axes.barh(at, y, thickness * 0.92, xerr=reach, **style)
        else:
            axes.bar(at, y, thickness * 0.92, yerr=reach, **style)
    if lying:
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(chart.y_label)
        axes.set_ylabel(chart.x_label)
        axes.set_ylim(len(names) - 0.45, -0.55)
    else:
        axes.set_xticks(range(len(names)), names)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
    axes.grid(axis="x" if lying else "y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.log_y:
        (axes.set_xscale if lying else axes.set_yscale)("log")
    if len(chart.lines) > 1:
        axes.legend(**BESIDE)


def _field(figure: Figure, axes: Axes, field: Field) -> None:
    """Colours by steps; of probabilities also the line where they are a half."""
    z = np.array(field.z, dtype=np.float64)
    wide, high = max(field.x) - min(field.x), max(field.y) - min(field.y)
    figure.set_size_inches(WIDTH * 0.8, WIDTH * 0.6 * min(1.2, high / wide) + 0.9)
    probabilities = bool(np.nanmin(z) >= 0 and np.nanmax(z) <= 1)
    levels: Any = np.linspace(0, 1, 11) if probabilities else 12
    shown = axes.contourf(field.x, field.y, z, levels=levels, cmap="RdBu_r", alpha=0.6)
    if probabilities and np.nanmin(z) < 0.5 < np.nanmax(z):
        axes.contour(field.x, field.y, z, levels=[0.5], colors=INK, linewidths=1.4)
    for index, (name, (x, y)) in enumerate(field.points.items()):
        axes.scatter(
            x, y, s=16, marker=MARKERS[index % len(MARKERS)], color=("#08306b", "#7f0000", *COLOURS)[index], label=name,
            edgecolors="white", linewidths=0.5, zorder=3,
        )  # fmt: skip
    axes.set_aspect("equal")
    axes.set_xlim(min(field.x), max(field.x))
    axes.set_ylim(min(field.y), max(field.y))
    figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    if field.points:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.06), ncols=4, frameon=False, handletextpad=0.2)
