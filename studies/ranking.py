"""Figures of many candidates from the same seeds -> who differs from whom, groups within noise, rank correlation.

The seeds are blocks: a candidate's figure is an effect of its own, one of the seed, and noise of one size for all,
    y[candidate, seed] = mean + candidate + seed + noise,
so noise is estimated from all candidates at once, with (candidates - 1)(seeds - 1) degrees of freedom. Three seeds of
one pair alone would have two, and an interval that is nine times as wide under 24 comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
DRAWS = 10_000


@dataclass(frozen=True)
class Noise:
    """What one figure varies by once its candidate and its seed are taken out.

    Args:
        sd: standard deviation; NaN where it cannot be known.
    """

    sd: float
    degrees: int
    seeds: int

    @property
    def of_difference(self) -> float:
        """Standard error of the difference of two candidates' means."""
        return self.sd * math.sqrt(2 / self.seeds)

    @property
    def known(self) -> bool:
        return self.degrees > 0


@dataclass(frozen=True)
class Difference:
    """Of two candidates' means.

    Args:
        low, high: where it lies, at the level of its step in Holm's procedure: 0 is outside where it is `real`, alone.
        p: of no difference, two-sided, adjusted over the family (Holm 1979); 1 where noise is not known.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def real(self) -> bool:
        return self.p < LEVEL

    @property
    def text(self) -> str:
        return f"{self.value:+.4f}" + ("" if math.isnan(self.low) else f" ± {self.value - self.low:.4f}")


def noise(values: Mapping[str, Sequence[float]]) -> Noise:
    """Of figures by candidate, one a seed, in the same order of seeds everywhere."""
    y = np.array([list(each) for each in values.values()], dtype=np.float64)
    candidates, seeds = y.shape
    degrees = (candidates - 1) * (seeds - 1)
    if degrees == 0:
        return Noise(math.nan, 0, seeds)
    rest = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0, keepdims=True) + y.mean()
    return Noise(math.sqrt(float((rest**2).sum()) / degrees), degrees, seeds)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted (Holm 1979): the k-th smallest of n times n - k + 1, and never falling."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, p[at] * (len(p) - rank)))
        adjusted[at] = largest
    return adjusted


def differences(
    values: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], known: Noise
) -> list[Difference]:
    """Of each pair, first minus second; the pairs are one family."""
    found = [float(np.mean(values[first]) - np.mean(values[second])) for first, second in pairs]
    if not known.known:
        return [Difference(value, math.nan, math.nan, 1.0) for value in found]
    error = max(known.of_difference, 1e-12)  # figures that do not vary at all
    alone = [float(2 * stats.t.sf(abs(value) / error, known.degrees)) for value in found]
    p = holm(alone)
    # The procedure compares the k-th smallest of n with LEVEL / (n - k + 1), and stops at the first that is not below.
    real = sum(each < LEVEL for each in p)
    result = []
    for value, own, adjusted in zip(found, alone, p, strict=True):
        step = min(sum(other < own for other in alone), real)
        reach = float(stats.t.ppf(1 - LEVEL / 2 / (len(found) - min(step, len(found) - 1)), known.degrees)) * error
        result.append(Difference(value, value - reach, value + reach, adjusted))
    return result


def groups(values: Mapping[str, Sequence[float]], known: Noise) -> list[list[str]]:
    """Candidates from the least mean up, in groups within noise.

    A group is its first, and those after it up to the one that differs from that first, which begins the next group;
    each first is compared with all behind it, as one family.
    """
    order = sorted(values, key=lambda name: float(np.mean(values[name])))
    found: list[list[str]] = []
    while order:
        first, behind = order[0], order[1:]
        compared = differences(values, [(name, first) for name in behind], known)
        size = 1 + next((at for at, difference in enumerate(compared) if difference.real), len(behind))
        found.append(order[:size])
        order = order[size:]
    return found


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's, of ours with a published table.

    Args:
        low, high: the middle 95 % of it when our means are drawn anew from their noise; the table is taken as exact.
        p: share of random orders that agree as well or better.
    """

    names: tuple[str, ...]
    value: float
    low: float
    high: float
    p: float


def rank_correlation(
    ours: Mapping[str, float], published: Mapping[str, float], error: float, seed: int = 0
) -> RankCorrelation:
    """Over the names that both have.

    Args:
        error: standard error of our means; NaN where it is not known.
    """
    names = tuple(name for name in published if name in ours)
    x, y = (np.array([table[name] for name in names]) for table in (ours, published))
    theirs = stats.rankdata(y)
    rng = np.random.default_rng(seed)
    value = float(_correlation(stats.rankdata(x)[None], theirs)[0])
    if math.isnan(error):
        low = high = math.nan
    else:
        drawn = x + rng.normal(scale=error, size=(DRAWS, len(x)))
        low, high = np.percentile(_correlation(stats.rankdata(drawn, axis=1), theirs), [2.5, 97.5]).tolist()
    shuffled = rng.permuted(np.tile(stats.rankdata(x), (DRAWS, 1)), axis=1)
    as_good = _correlation(shuffled, theirs) >= value - 1e-12
    return RankCorrelation(names, value, low, high, float((as_good.sum() + 1) / (DRAWS + 1)))


def _correlation(ranks: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's of each row of ranks [N, n] with ranks [n]."""
    a, b = ranks - ranks.mean(axis=1, keepdims=True), theirs - theirs.mean()
    product: NDArray[np.float64] = (a @ b) / np.sqrt((a**2).sum(axis=1) * (b**2).sum())
    return product
