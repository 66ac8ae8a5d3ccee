"""Figures of several seeds as they are read, in words and in drawings: their median, and their range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from studies.study import Line


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of what the seeds gave."""

    mean: float
    median: float
    low: float
    high: float
    seeds: int

    def text(self, figures: int = 3) -> str:
        """`0.288 (0.277 to 0.297)`; of one seed without a range, which it does not show."""
        middle = shown(self.median, figures)
        return middle if self.seeds == 1 else f"{middle} ({shown(self.low, figures)} to {shown(self.high, figures)})"


def spread_of(values: Iterable[float]) -> Spread:
    array = np.fromiter(values, dtype=np.float64)
    return Spread(float(array.mean()), float(np.median(array)), float(array.min()), float(array.max()), len(array))


def line_of(name: str, x: Sequence[float] | Sequence[str], spreads: Sequence[Spread], dashed: bool = False) -> Line:
    """Medians, with the range where there are several seeds."""
    middle, low, high = ([float(f"{getattr(each, end):.4g}") for each in spreads] for end in ("median", "low", "high"))
    if all(each.seeds == 1 for each in spreads):
        return Line(name, x, middle, dashed=dashed)
    return Line(name, x, middle, low, high, dashed)


def shown(value: float, figures: int = 3) -> str:
    """To so many figures, trailing zeros kept, and never in powers of ten below a million."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = max(0, figures - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{min(decimals, 6)}f}"


def percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %"
