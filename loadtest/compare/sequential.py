"""Many looks at one comparison without more false alarms: looks and a level in, the level of the present look out.

A driver that looks ten times at 5 % and stops at the first difference is wrong in 19 % of the comparisons without one.
Here each look spends a part of the level, little at first (Lan and DeMets, "Discrete sequential boundaries for
clinical trials", Biometrika 1983, with the spending function that is like O'Brien and Fleming's), so that all looks
together cross falsely with at most that level. Neither the number of looks nor their times need be planned, only what
is seen must not choose them. The interval of the same level at every look is a repeated confidence interval (Jennison
and Turnbull, JRSS B 1989): it holds the truth at all looks at once, so also at the one that ended the comparison.

The sums of the estimate over rounds are taken to move as a Brownian motion. Its density where it has not yet crossed
is carried from look to look by Gauss-Legendre quadrature (Armitage, McPherson and Rowe, JRSS A 1969).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats

NODES = 256  # of the quadrature: 5 equal looks come out as published to 1e-5, 40 looks within 1e-4 of their level
FARTHEST = 8.0  # standard errors; beyond it lies 1e-15, which nobody spends

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Look:
    """One look at the data."""

    rounds: int  # that count, so far
    share: float  # of all that was planned, in 0..1; 1 at the end


def spent(share: float, level: float) -> float:
    """How much of the two-sided `level` the looks up to this share of the plan may use."""
    return float(4 * stats.norm.sf(stats.norm.isf(level / 4) / math.sqrt(share))) if share > 0 else 0.0


@lru_cache(maxsize=4096)
def nominal(looks: tuple[Look, ...], level: float) -> float:
    """The two-sided level at which the last of `looks` tests, so that all of them together keep `level`.

    0 where the last look can spend nothing.
    """
    return 2 * float(stats.norm.sf(_walk(looks, level)[0]))


@lru_cache(maxsize=4096)
def _walk(looks: tuple[Look, ...], level: float) -> tuple[float, Array, Array, Array]:
    """The last look's boundary in standard errors; nodes, weights and density of the sum that has not crossed."""
    *before, look = looks
    budget = spent(look.share, level) - (spent(before[-1].share, level) if before else 0.0)
    if not before:
        crossing = float(stats.norm.isf(budget / 2))
        nodes, weights = _grid(min(crossing, FARTHEST) * math.sqrt(look.rounds))
        return crossing, nodes, weights, stats.norm.pdf(nodes, scale=math.sqrt(look.rounds))

    _, nodes, weights, density = _walk(tuple(before), level)
    root, step = math.sqrt(look.rounds), math.sqrt(look.rounds - before[-1].rounds)

    def crossed(standard_errors: float) -> float:
        return float(2 * weights @ (density * stats.norm.sf((standard_errors * root - nodes) / step)))

    if budget <= crossed(FARTHEST):
        crossing = math.inf
    else:
        crossing = float(optimize.brentq(lambda each: crossed(each) - budget, 0.0, FARTHEST, xtol=1e-10))
    new, new_weights = _grid(min(crossing, FARTHEST) * root)
    moved = stats.norm.pdf(new[:, None], loc=nodes, scale=step) @ (weights * density)  # new nodes x nodes -> new nodes
    return crossing, new, new_weights, moved


def _grid(farthest: float) -> tuple[Array, Array]:
    nodes, weights = _unit_grid()
    return nodes * farthest, weights * farthest


@lru_cache
def _unit_grid() -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(NODES)
