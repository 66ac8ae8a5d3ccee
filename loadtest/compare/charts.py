"""The figures of a comparison's report, each from the verdict or the blocks; `page.py` paints them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from loadtest import page
from loadtest.compare.design import AGAIN
from loadtest.compare.frontier import Point
from loadtest.compare.statistics import whole_rounds
from loadtest.compare.verdict import percent
from loadtest.compare.words import medians, name_of
from loadtest.page import GREY, colour, figure, log_ticks

# By outcome: red costs, green saves, blue is the same, grey is not known. Shapes tell them apart without the colour.
OUTCOMES = {
    "slower": ("#d1585c", "triangle-right"),
    "faster": ("#3fa36b", "triangle-left"),
    "equivalent": ("#3b8bd0", "square"),
    "inconclusive": ("#b5962b", "circle-open"),
}
BAND = "rgba(138, 143, 152, 0.18)"
PARTS = ("queue", "tokenize", "infer")
# Of a model's run: the feed-forward blocks in one hue, then the others.
RUN_PARTS = {
    "products of the feed-forward blocks": "#f0a56f",
    "activation": "#c2571a",
    "attention": "#3b8bd0",
    "head": "#8f7ae0",
    "other": GREY,
}
ROW = 34  # pixels of one arm
SIDES = ("top right", "bottom right", "top left", "bottom left", "top center", "bottom center")  # for a point's name


def in_percent(ratio: float) -> float:
    return (ratio - 1) * 100


Rows = Sequence[tuple[str, Mapping[str, Any]]]  # (arm, {"ratio", "low", "high"})


def forest(found: Mapping[str, Any], x_title: str) -> go.Figure:
    """Each arm's ratio of p50 with its interval, largest on top, the A/A arm last; the margin is shaded.

    `found` is a verdict, or what `against.compare` found.
    """
    drawn = figure(x_title, "", hovermode="closest")
    arms = [arm for arm in found["arms"] if arm["p50"]]
    arms.sort(key=lambda arm: -arm["p50"]["ratio"])
    check = name_of(found["baseline"] + AGAIN)
    names = [*(arm["model"] for arm in arms), check]
    margin = found["margin"]
    drawn.add_vrect(
        x0=in_percent(1 / (1 + margin)), x1=in_percent(1 + margin), fillcolor=BAND, line_width=0, layer="below"
    )
    drawn.add_vline(x=0, line={"color": GREY, "width": 1})
    for outcome, (paint, symbol) in OUTCOMES.items():
        rows = [(arm["model"], arm["p50"]) for arm in arms if arm["outcome"] == outcome]
        if rows:
            _whiskers(drawn, rows, outcome, paint, symbol, size=12)
    if found["aa"]["ratio"] is not None:
        _whiskers(drawn, [(check, found["aa"])], "A/A check", GREY, "diamond", size=11)
    infer = [(arm["model"], arm["infer"]) for arm in arms if (arm.get("infer") or {}).get("ratio") is not None]
    if infer:
        _whiskers(drawn, infer, "server's infer alone", GREY, "line-ns-open", size=9, thin=True)
    drawn.update_yaxes(categoryorder="array", categoryarray=names[::-1], type="category")
    drawn.update_xaxes(ticksuffix=" %", showgrid=True)
    drawn.update_layout(height=max(460, 150 + ROW * len(names)))
    return drawn


def _whiskers(drawn: go.Figure, rows: Rows, name: str, paint: str, symbol: str, size: int, thin: bool = False) -> None:
    middle = [in_percent(measure["ratio"]) for _, measure in rows]
    drawn.add_scatter(
        x=middle,
        y=[row for row, _ in rows],
        name=name,
        mode="markers",
        marker={"color": paint, "symbol": symbol, "size": size, "line": {"width": 2, "color": paint}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_reach(measure, "high") for _, measure in rows],
            "arrayminus": [-_reach(measure, "low") for _, measure in rows],
            "color": paint,
            "thickness": 1 if thin else 3,
            "width": 0 if thin else 5,
        },
        opacity=0.75 if thin else 1,
        hovertemplate="%{y}: %{x:+.2f} %<extra>" + name + "</extra>",
    )


def _reach(measure: Mapping[str, Any], end: str) -> float:
    """From the middle of a bar to its end; 0 where the interval is open."""
    return 0.0 if measure[end] is None else in_percent(measure[end]) - in_percent(measure["ratio"])


def quality_against_latency(
    points: Sequence[Point], arms: Sequence[str], baseline: str, baseline_ms: float
) -> go.Figure:
    """The frontier: bits per byte of held-out text against p50, both better when lower; a staircase joins the best."""
    drawn = figure(
        f"p50 in ms, and over {baseline}'s", "bits per byte of held-out text", hovermode="closest", showlegend=False
    )
    best = [point for point in points if point.best]
    drawn.add_scatter(
        x=[in_percent(point.ratio) for point in best],
        y=[point.bits for point in best],
        mode="lines",
        line={"shape": "hv", "width": 2, "dash": "dot", "color": GREY},
        hoverinfo="skip",
    )
    x_range, y_range = _room(points)
    for point, place in zip(points, _places(points, x_range, y_range), strict=True):
        x, paint = in_percent(point.ratio), colour(arms.index(point.model))
        drawn.add_scatter(
            x=[x],
            y=[point.bits],
            mode="markers+text",
            text=[f"<b>{point.model}</b>" if point.best else point.model],
            textposition=place,
            textfont={"color": paint},
            cliponaxis=False,  # on a phone a long name reaches over the axis
            marker={"size": 12, "color": paint, "symbol": "circle" if point.best else "circle-open", "line_width": 2},
            error_x=_bar(x, in_percent(point.low), in_percent(point.high), paint),
            error_y=_bar(point.bits, point.bits_low, point.bits_high, paint),
            hovertemplate=f"{point.model}: {percent(point.ratio)} p50, %{{y:.4f}} bits per byte<extra></extra>",
        )
    ticks = _steps(*x_range)
    drawn.update_xaxes(
        range=x_range,
        tickvals=ticks,
        ticktext=[f"{baseline_ms * (1 + tick / 100):.2f}<br>{f'{tick:+g}' if tick else 0} %" for tick in ticks],
    )
    drawn.update_yaxes(range=y_range)
    drawn.add_annotation(
        text="↙ better", x=0.01, y=0.01, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False
    )
    drawn.update_layout(height=460, margin_b=64)
    return drawn


def _bar(middle: float, low: float, high: float, paint: str) -> dict[str, Any]:
    shape = {"color": paint, "thickness": 1.5, "width": 4}
    return {"type": "data", "symmetric": False, "array": [high - middle], "arrayminus": [middle - low], **shape}


FAR = 400.0  # percent: an interval of an early look may reach to millions, and goes on past the axis


def _room(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The axes' ranges: every bar up to FAR, and space for the names beside the points."""
    xs = [min(in_percent(ratio), FAR) for point in points for ratio in (point.ratio, point.low, point.high)]
    ys = [bits for point in points for bits in (point.bits, point.bits_low, point.bits_high)]
    ranges = []
    for values, least in ((xs, 1.0), (ys, 0.01)):
        pad = 0.15 * max(max(values) - min(values), least)
        ranges.append([min(values) - pad, max(values) + pad])
    return ranges[0], ranges[1]


def _steps(low: float, high: float) -> list[float]:
    """Four to nine round numbers of percent within the range, 0 among them."""
    step = next(s * 10.0**power for power in range(-2, 6) for s in (1, 2, 5) if (high - low) / (s * 10.0**power) <= 8)
    return [round(i * step, 6) + 0.0 for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _places(points: Sequence[Point], x_range: Sequence[float], y_range: Sequence[float]) -> list[str]:
    """Where each name stands: the first side on which it covers neither another point nor a name."""

    def across(ratio: float) -> float:
        return (in_percent(ratio) - x_range[0]) / (x_range[1] - x_range[0])

    def up(bits: float) -> float:
        return (bits - y_range[0]) / (y_range[1] - y_range[0])

    spots = [(across(point.ratio), up(point.bits)) for point in points]
    boxes: list[tuple[float, ...]] = [(x - 0.012, y - 0.018, x + 0.012, y + 0.018) for x, y in spots]
    boxes += [(across(p.low), y - 0.008, across(p.high), y + 0.008) for p, (_, y) in zip(points, spots, strict=True)]
    best = [spot for point, spot in zip(points, spots, strict=True) if point.best]
    for (x, y), (next_x, next_y) in itertools.pairwise(best):  # the staircase
        boxes += [(x, y - 0.004, next_x, y + 0.004), (next_x - 0.004, next_y, next_x + 0.004, y)]
    places = []
    for point, spot in zip(points, spots, strict=True):
        near = min((other for other in spots if other != spot), key=lambda other: math.dist(other, spot), default=spot)
        away = "left" if near[0] > spot[0] else "right"  # so that a name is not taken for its neighbour's
        order = sorted(SIDES, key=lambda side: not side.endswith(away))
        sides = {side: _box(side, spot, len(point.model)) for side in order}
        covered = {side: _covers(box, boxes) for side, box in sides.items()}
        places.append(min(order, key=covered.__getitem__))  # the first of the best
        boxes.append(sides[places[-1]])
    return places


def _box(side: str, spot: tuple[float, float], letters: int) -> tuple[float, ...]:
    """What a name covers, in shares of the axes: left, bottom, right, top."""
    # A letter is about 8 of 560 pixels wide and a line 18 of 380 high, in the narrower of two columns.
    wide, high, off = 0.0145 * letters, 0.048, 0.024
    up, across = side.split()
    left = spot[0] + {"right": off, "center": -wide / 2, "left": -off - wide}[across]
    bottom = spot[1] + {"top": off, "bottom": -off - high}[up]
    return left, bottom, left + wide, bottom + high


def _covers(box: tuple[float, ...], boxes: Sequence[tuple[float, ...]]) -> int:
    """How many others; more than all of them where it leaves the picture."""
    outside = min(box) < 0 or max(box) > 1
    return sum(_meet(box, each) for each in boxes) + outside * len(boxes)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def time_line(blocks: pl.DataFrame, arms: Sequence[str]) -> go.Figure:
    """Each block's p50 at the middle of the block; what all arms share, as a drift, is the grey line."""
    drawn = figure("seconds since the load began", "p50 of a block, ms", hovermode="closest")
    measured = blocks.filter(pl.col("p50_ms").is_not_null() & pl.col("p50_ms").is_finite())
    middle = pl.col("began_s") + pl.col("window_s") / 2
    rounds = (
        whole_rounds(measured)
        .group_by("round")
        .agg(middle.mean().alias("at_s"), pl.col("p50_ms").median())
        .sort("at_s")
    )
    drawn.add_scatter(
        x=rounds["at_s"].to_list(),
        y=rounds["p50_ms"].to_list(),
        name="all of a round",
        mode="lines",
        line={"width": 1.5, "color": GREY},
        hovertemplate="median of the round: %{y:.2f} ms<extra></extra>",
    )
    size = 7 if len(measured) < 300 else 5 if len(measured) < 1500 else 3
    for index, arm in enumerate(arms):
        mine = measured.filter((pl.col("arm") == arm) & (pl.col("void") == "")).with_columns(middle.alias("at_s"))
        paint = colour(index)
        drawn.add_scatter(
            x=mine["at_s"].round(2).to_list(),
            y=mine["p50_ms"].round(3).to_list(),
            customdata=mine["round"].to_list(),
            name=name_of(arm),
            mode="markers",
            marker={"size": size, "color": paint, "symbol": "diamond-open" if arm.endswith(AGAIN) else "circle"},
            hovertemplate="round %{customdata}: %{y:.2f} ms<extra>" + name_of(arm) + "</extra>",
        )
    every = measured["p50_ms"].to_numpy()
    void = blocks.filter(pl.col("void") != "").with_columns(middle.alias("at_s"))
    if len(void):
        lowest = float(every.min()) if len(every) else 1.0
        drawn.add_scatter(
            x=void["at_s"].round(2).to_list(),
            y=void["p50_ms"].fill_nan(None).fill_null(lowest).to_list(),
            text=[f"{name_of(arm)}, round {n}: {why}" for arm, n, why in void.select("arm", "round", "void").rows()],
            name="void",
            mode="markers",
            marker={"size": 11, "symbol": "x-thin", "line": {"width": 2, "color": "#d1585c"}},
            hovertemplate="void: %{text}<extra></extra>",
        )
    if len(every):
        drawn.update_yaxes(**log_ticks(every))
    return drawn


def latencies(samples: pl.LazyFrame, blocks: pl.DataFrame, arms: Sequence[str]) -> dict[str, np.ndarray]:
    """Corrected latencies by arm, of answers that went well in rounds without a void block."""
    rounds = whole_rounds(blocks)["round"].unique().implode()
    good = samples.filter(~pl.col("settling") & (pl.col("failure") == "") & pl.col("round").is_in(rounds))
    found = good.select("arm", (pl.col("latency_ms") + pl.col("late_ms")).alias("ms")).collect()
    return {arm: found.filter(pl.col("arm") == arm)["ms"].to_numpy() for arm in arms}


def server_beside_client(
    blocks: pl.DataFrame, arms: Sequence[str]
) -> tuple[go.Figure, list[tuple[str, list[float]]]] | None:
    """Where an answer's time goes, by arm; None where the server tells no times. (figure, [(arm, parts and p50)])"""
    rows = []
    for arm, times in medians(blocks, [f"{part}_ms" for part in PARTS] + ["p50_ms"]).items():
        known = [times[f"{part}_ms"] for part in PARTS]
        p50 = times["p50_ms"]
        if p50 is not None and all(value is not None for value in known):
            parts = [float(value or 0.0) for value in known]
            rows.append((arm, [*parts, max(p50 - sum(parts), 0.0), p50]))
    if not rows:
        return None
    rows.sort(key=lambda row: arms.index(row[0]))
    names = (*PARTS, "the rest")
    parts_ms = {part: [times[i] for _, times in rows] for i, part in enumerate(names)}
    return page.stacked("median, ms", [name_of(arm) for arm, _ in rows], parts_ms), rows


def ffn_share(shares: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """What each variant's own run is made of, by ONNX Runtime's profile; `ffn` counts the activation in."""
    parts = {
        "products of the feed-forward blocks": [share["ffn"] - share["activation"] for share in shares.values()],
        **{part: [share[part] for share in shares.values()] for part in ("activation", "attention", "head", "other")},
    }
    drawn = page.stacked("share of the model's run", list(shares), parts, RUN_PARTS, "%{x:.1%} of the run")
    drawn.update_xaxes(tickformat=".0%", range=[0, 1])
    return drawn


def latency_against_rate(result: Mapping[str, Any], arms: Sequence[str]) -> go.Figure:
    """p99, and dotted p50, of each arm at each rate; the objective is the line that a knee is at."""
    drawn = figure("planned arrivals per second", "latency from the planned send, ms", hovermode="closest")
    every = [row for row in result["sweep"] if row["p99_ms"] is not None]
    for index, arm in enumerate(arms):
        rows = [row for row in every if row["arm"] == arm]
        for percentile, dash in (("p50", "dot"), ("p99", "solid")):
            drawn.add_scatter(
                x=[row["rate"] for row in rows],
                y=[row[f"{percentile}_ms"] for row in rows],
                name=name_of(arm),
                legendgroup=arm,
                showlegend=percentile == "p99",
                mode="lines+markers" if percentile == "p99" else "lines",
                line={"width": 2 if percentile == "p99" else 1, "color": colour(index), "dash": dash},
                marker={"symbol": ["circle" if row["kept_plan"] else "x" for row in rows], "size": 7},
                hovertemplate=f"{percentile} %{{y:.1f}} ms at %{{x:g}}/s<extra>{name_of(arm)}</extra>",
            )
    drawn.add_hline(y=result["objective_ms"], line={"color": GREY, "width": 1, "dash": "dash"})
    values = [row[name] for row in every for name in ("p50_ms", "p99_ms")]
    drawn.update_yaxes(**log_ticks(np.array([*values, result["objective_ms"]])))
    return drawn
