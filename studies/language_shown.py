"""The tables and charts of the study of language: each size's order, the rates, the published tables, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from studies.language_runs import Run, Trained, outermost
from studies.language_sizes import ORDER, PUBLISHED, REFERENCE, Size
from studies.ranking import LEVEL, groups, rank_correlation
from studies.study import Cell, Chart, Line, Table

FAMILIES = {
    "squashing": ("Squashing and rectifying", ("threshold", "sigmoid", "tanh", "softmax", "relu", "relu6", "relu2")),
    "linear": ("Linear at the right", ("relu", "leaky_relu", "prelu", "elu", "selu", "celu", "softplus")),
    "smooth": ("Self-gated", ("relu", "gelu_tanh", "quick_gelu", "silu", "swish", "mish", "solu")),
    "gated": ("Gated", ("relu", "glu", "bilinear", "reglu", "geglu", "swiglu")),
}
POINTS = 25  # of a curve
# Of 700 simulated tables of 25 equal activations, noise log-normal from one to the next (sigma 0.8).
FEW_SEEDS = {
    2: " Two seeds find too much: where noise is uneven, 10 to 15 % of tables hold a difference that is none, not 5 %.",
    3: " Three seeds find a little too much: where noise is uneven, 5 to 9 % of tables hold a difference that is none.",
}
NEAREST = 15  # activations that the closer chart shows


def order_table(size: Size) -> Table:
    rows: list[list[Cell]] = []
    known = size.noise.known
    found = groups(size.values, size.noise) if known else [sorted(size.means, key=size.means.__getitem__)]
    for number, group in enumerate(found, 1):
        for name in group:
            values, over = size.values[name], size.over.get(name)
            spread = round(stdev(values), 4) if len(values) > 1 else None
            versus = None if over is None else over.text
            rows.append(
                [number if known else None, name, round(size.means[name], 4), spread, versus,
                 None if over is None or not known else "yes" if over.real else "within noise"]
            )  # fmt: skip
    rows += [[None, name, "diverged", None, "; ".join(said), None] for name, said in size.diverged.items() if said]
    what = f"noise of one figure {size.noise.sd:.4f}, by the median of all, or an activation's own where that is larger"
    return Table(
        f"Held-out bits per byte at {size.name}",
        ("group", "activation", "mean", "sd over seeds", f"above {REFERENCE}", f"differs from {REFERENCE}"),
        rows,
        f"The seeds are blocks; {what}. Differs: p < {LEVEL:g}, two-sided, adjusted over all activations (Holm). "
        "The ± is the reach at that level: it leaves 0 out where they differ, and there alone. A group is its first "
        "and all behind it up to the one that differs from that first, which begins the next: its members are within "
        f"noise of its first.{FEW_SEEDS.get(size.noise.seeds, '')}"
        if known
        else "The spread is not known, so nothing is told apart.",
    )


def at_edge(trained: Trained) -> dict[str, float]:
    """The activations whose rate is the outermost of those they were tried at, and that rate."""
    return {name: rate for name, rate in trained.rate.items() if outermost(trained.tuned[name])}


def edge_sentence(trained: Trained) -> str:
    """What the verdict's sentence owes to rates that were not bracketed; empty where all were."""
    edge = at_edge(trained)
    if not edge:
        return ""
    claimed = dict.fromkeys(name for pair in ORDER for name in pair)
    among = ", ".join(name for name in claimed if name in edge)
    return (
        f" The rates of {len(edge)} of {len(trained.rate)} activations lie at the edge of those tried"
        f"{f', of {among} too' if among else ''}: a better one may lie past it."
    )


def tuning_table(trained: Trained) -> Table:
    """A row for each activation; its cells are blank at rates that others were tried at, and it was not."""
    rows: list[list[Cell]] = []
    edge = at_edge(trained)
    rates = sorted({rate for tuned in trained.tuned.values() for rate in tuned})
    for name, rate in trained.rate.items():
        ends: list[Cell] = [_shown(trained.tuned[name].get(each)) for each in rates]
        rows.append([name, *ends, f"{rate:g}", "at the edge" if name in edge else ""])
    return Table(
        "Which rate",
        ("activation", *(f"{rate:g}" for rate in rates), "chosen", ""),
        rows,
        "Bits per byte of training text, the mean of the last fifth of the tuning. Blank: not tried; past "
        "those that all were tried at, a rate is tried only next to a best one that is the outermost.",
    )


def _shown(value: float | None) -> str | None:
    return None if value is None else "diverged" if math.isinf(value) else f"{value:.3f}"


def published_tables(sizes: Mapping[str, Size]) -> list[Table]:
    """The published tables beside ours, and how well the orders agree."""
    tables, correlations = [], list[list[Cell]]()
    for source, (columns, published) in PUBLISHED.items():
        rows: list[list[Cell]] = [
            [name, *figures, *(round(size.means[name], 4) if name in size.means else None for size in sizes.values())]
            for name, figures in sorted(published.items(), key=lambda item: item[1][1])
            if any(name in size.runs for size in sizes.values())
        ]
        tables.append(Table(f"Beside {source}", ("activation", *columns, *(f"ours, {size}" for size in sizes)), rows))
        for at, column in enumerate(columns):
            for size in sizes.values():
                theirs = {name: figures[at] for name, figures in published.items()}
                if sum(name in size.means for name in theirs) < 3:
                    continue
                found = rank_correlation(size.means, theirs, {name: size.noise.error(name) for name in size.means})
                interval = None if math.isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}"
                correlations.append(
                    [
                        f"{source}, {column}",
                        size.name,
                        len(found.names),
                        round(found.value, 2),
                        interval,
                        round(found.p, 4),
                    ]
                )
    tables.append(
        Table(
            "Rank correlation (Spearman)",
            ("published", "ours", "activations", "correlation", "95 % by our noise", "p"),
            correlations,
            "Of held-out losses; 1: the same order. The interval draws our means anew from their noise and takes the "
            "published figures as exact; p is the share of random orders that agree as well.",
        )
    )
    return tables


def difference_charts(sizes: Sequence[Size]) -> list[Chart]:
    """Bits per byte above gelu, of all, and of the best on a scale of their own."""
    last = sizes[-1]
    order = sorted(last.over, key=last.means.__getitem__)
    charts = []
    for name, title, names in (
        ("order", "Held-out bits per byte above gelu", order),
        ("near", f"The best {NEAREST} from nearer", order[:NEAREST]),
    ):
        lines = []
        for size in sizes:
            there = [each for each in names if each in size.over]
            over = [size.over[each] for each in there]
            spread = size.noise.known
            lines.append(
                Line(
                    size.name,
                    there,
                    [each.value for each in over],
                    low=[each.low for each in over] if spread else None,
                    high=[each.high for each in over] if spread else None,
                )
            )
        charts.append(
            Chart(name, title, "activation", "bits per byte above gelu: less is better", lines, kind="bars",
                  note="Whiskers leave 0 out where it differs from gelu, adjusted over all activations (Holm).")
        )  # fmt: skip
    return charts


def smoothed(runs: Sequence[Run], points: int = POINTS) -> list[tuple[float, float]]:
    """(step, bits per byte of training text): means over seeds and over `points` stretches of the steps."""
    curves = [dict(run.curve) for run in runs if not run.diverged]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    count = min(points, len(steps))
    stretches = [steps[len(steps) * at // count : len(steps) * (at + 1) // count] for at in range(count)]
    return [(mean(each), mean(curve[step] for curve in curves for step in each)) for each in stretches]


def curve_charts(size: Size) -> list[Chart]:
    """Loss over steps: of gelu, and of every activation above gelu's on the same batches."""
    whole = {name: smoothed(runs) for name, runs in size.runs.items()}
    shown = [name for name in ("threshold", "softmax", "sigmoid", "relu", "gelu", "swiglu") if whole.get(name)]
    charts = [
        Chart(
            "curves",
            f"Training text over steps, {size.name}",
            "step",
            "bits per byte",
            [_line(name, whole[name]) for name in shown],
            note="Each point is a mean over seeds and a stretch of steps, of batches before they are learned from.",
        )
    ]
    if not whole.get(REFERENCE):
        return charts
    against = dict(whole[REFERENCE])
    known = {name for _, names in FAMILIES.values() for name in names}
    for key, (title, names) in FAMILIES.items():
        others = [name for name in size.runs if name not in known and name != REFERENCE] if key == "smooth" else []
        lines = []
        for name in (*names, *others):
            paired = [(step, bits - against[step]) for step, bits in whole.get(name, ()) if step in against]
            if paired and name in size.runs:
                lines.append(_line(name, paired, dashed=name == "relu"))
        if lines:
            charts.append(
                Chart(f"above-{key}", f"{title}: training text above gelu's, {size.name}", "step",
                      "bits per byte above gelu", lines)
            )  # fmt: skip
    return charts


def _line(name: str, points: Sequence[tuple[float, float]], dashed: bool = False) -> Line:
    return Line(name, [step for step, _ in points], [bits for _, bits in points], dashed=dashed)
