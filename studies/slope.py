"""Claim 1: sigmoid's slope is s(1 - s), at most 0.25 at 0, and near zero in the flat ends.

Source: 000, 002, 003, 004. Refuted by a slope over 0.25, a steepest place other than 0, a slope that is not s(1 - s),
or ends that are not flat.

The slope is autograd's of the registry's own expression, held to s(1 - s) and to differences of values. It is computed,
not measured, so `make docs` writes it anew where the registry has changed.
"""

from __future__ import annotations

import itertools
import math

import torch

from export.catalogue import curve
from models.activations import get, registry
from studies.study import Chart, Claim, Figure, Finding, Line, Options, Table, verdict_of

CLAIM = Claim(
    number=1,
    name="slope",
    title="Sigmoid's slope is at most a quarter",
    statement="The gradient of sigmoid is s(1 - s): at most 0.25, at 0, and near zero in the flat ends.",
    source="000, 002, 003, 004",
    refuted_by="a slope over 0.25, a steepest place other than 0, a slope that is not s(1 - s), or no flat ends.",
)

PLACES = (-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0)
PUBLISHED = {5.0: (0.9933, 0.0066)}  # z: value, slope
STEP = 1e-5  # of differences in float64: their error is STEP^2 / 6 and 1e-16 / STEP, below 1e-10
FLAT = 0.05  # of the steepest slope; what is below is called saturated
EVERY = 2  # of export's 241 places, for a page that loads
DIGITS = 5
# Which curves share a chart, and how far it reaches, where their differences are; others go by their kind.
FAMILIES = {
    "squashing": ("Squashing", 6.0, ("threshold", "sigmoid", "tanh", "softmax", "relu6")),
    "rectifying": ("Rectifying", 3.0, ("relu", "leaky_relu", "prelu", "relu2", "elu", "selu", "celu", "softplus")),
    "pointwise": ("Self-gated", 4.0, ("gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "mish")),
    "gated": ("Gated, with up = 1", 4.0, ("glu", "bilinear", "reglu", "geglu", "swiglu")),
    "hidden_axis": ("One unit of eight", 6.0, ("solu",)),
}
KIND_FAMILIES = {"pointwise": "pointwise", "learned": "pointwise", "gated": "gated", "hidden_axis": "hidden_axis"}


def value_and_slope(name: str, z: list[float]) -> tuple[list[float], list[float]]:
    """Of a pointwise activation, in float64; the slope by autograd."""
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    y = get(name).expression(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().tolist(), slope.tolist()


def closed_form(z: float) -> tuple[float, float]:
    """s and s(1 - s), without torch."""
    s = 1 / (1 + math.exp(-z))
    return s, s * (1 - s)


def difference(z: float) -> float:
    """The slope from two values."""
    return (closed_form(z + STEP)[0] - closed_form(z - STEP)[0]) / (2 * STEP)


def table() -> Table:
    values, slopes = value_and_slope("sigmoid", list(PLACES))
    rows = [
        (z, float(f"{value:.{DIGITS}g}"), float(f"{slope:.{DIGITS}g}"), float(f"{difference(z):.{DIGITS}g}"))
        for z, value, slope in zip(PLACES, values, slopes, strict=True)
    ]
    return Table("Value and slope of sigmoid", ("z", "sigmoid", "slope", "by differences"), rows)


def charts() -> list[Chart]:
    """Every f and every slope, by family."""
    placed = {name: family for family, (_, _, names) in FAMILIES.items() for name in names}
    found = []
    for family, (title, reach, _) in FAMILIES.items():
        records = [r for r in registry().values() if placed.get(r.name, KIND_FAMILIES[r.kind]) == family]
        curves = {record.name: curve(record) for record in records}
        for slope in (False, True):
            lines = []
            for name, each in curves.items():
                kept = [at for at in range(0, len(each.x), EVERY) if abs(each.x[at]) <= reach]
                values = each.slope if slope else each.y
                lines.append(Line(name, [each.x[at] for at in kept], _short([values[at] for at in kept])))
            found.append(
                Chart(
                    name=family.replace("_", "-") + ("-slope" if slope else ""),
                    title=f"{title}: " + ("slope" if slope else "value"),
                    x_label="x",
                    y_label="f'(x)" if slope else "f(x)",
                    lines=lines,
                    note=_together(lines),
                )
            )
    return found


def _together(lines: list[Line]) -> str:
    """Which lines hide others."""
    reach = max(abs(y) for line in lines for y in line.y if y is not None)
    hidden = []
    for one, other in itertools.combinations(lines, 2):
        pairs = [(a, b) for a, b in zip(one.y, other.y, strict=True) if a is not None and b is not None]
        if max(abs(a - b) for a, b in pairs) < 0.005 * reach:  # a line's width
            hidden.append(f"{other.name} on {one.name}")
    return f"Drawn on one another: {', '.join(hidden)}." if hidden else ""


def _short(values: list[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in values]


def steepness() -> Table:
    """How steep each activation gets, and where it is flat."""
    rows = []
    for name, record in registry().items():
        each = curve(record)
        slopes = [abs(slope) for slope in each.slope if slope is not None]
        steepest = max(slopes)
        flat = sum(slope <= FLAT * steepest for slope in slopes) / len(slopes)
        rows.append((name, float(f"{steepest:.{DIGITS}g}"), round(100 * flat, 1)))
    return Table(
        "Every activation between -6 and 6",
        ("activation", "steepest slope", "flat, % of the range"),
        rows,
        f"Flat: a slope of at most {FLAT:g} of the steepest. Gated forms with up = 1; softmax and solu for one unit of "
        "eight, the others at 0.",
    )


def run(options: Options) -> Finding:
    options.report("computing slopes", 0.0)
    return finding()


def finding() -> Finding:
    grid = [n / 100 for n in range(-4000, 4001)]
    _, slopes = value_and_slope("sigmoid", grid)
    worst = max(abs(slope - closed_form(z)[1]) for z, slope in zip(grid, slopes, strict=True))
    apart = max(abs(slope - difference(z)) for z, slope in zip(grid, slopes, strict=True))
    steepest = max(slopes)
    where = grid[slopes.index(steepest)]
    ends = max(slopes[grid.index(-10.0)], slopes[grid.index(10.0)])
    figures = [
        Figure("steepest slope", f"{steepest:.6g}", "0.25", steepest == 0.25),
        Figure("where", f"z = {where:g}", "z = 0", where == 0),
    ]
    for z, published in PUBLISHED.items():
        (value,), (slope,) = value_and_slope("sigmoid", [z])
        for what, ours, theirs in (("value", value, published[0]), ("slope", slope, published[1])):
            # To the digits that were published, cut off or rounded: s(1 - s) at 5 is 0.006648.
            figures.append(Figure(f"{what} at z = {z:g}", f"{ours:.6f}", f"{theirs:g}", abs(ours - theirs) < 1e-4))
    figures += [
        Figure("slope at z = 10 and -10", f"{ends:.2g}", "near zero", ends < FLAT * 0.25),
        Figure("largest difference from s(1 - s), z from -40 to 40", f"{worst:.1g}", "0", worst < 1e-15),
        Figure("largest difference from differences of values", f"{apart:.1g}", "0", apart < 1e-9),
    ]
    return Finding(
        verdict=verdict_of(figure.agrees is True for figure in figures),
        sentence=f"The steepest slope between -40 and 40 is {steepest:g}, at {where:g}; at 5 it is "
        f"{closed_form(5)[1]:.4f}, at 10 {closed_form(10)[1]:.1g}.",
        figures=figures,
        settings={"places": "-40 to 40 in steps of 0.01, float64", "difference": STEP},
        tables=(table(), steepness()),
        charts=charts(),
        data={"digests": {name: record.digest for name, record in registry().items()}},
    )
