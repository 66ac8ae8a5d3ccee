"""Figures of many candidates from the same seeds -> who differs from whom, groups within noise, rank correlation.

The seeds are blocks: a candidate's figure is an effect of its own, one of the seed, and noise,
    y[candidate, seed] = mean + candidate + seed + noise.
Three seeds of one pair alone leave two degrees of freedom, and an interval that is nine times as wide under 24
comparisons, so candidates lend one another their noise: its variance is the median of all, or a candidate's own where
that is larger. A mean in the median's place would let the noisiest decide for the steadiest: at 2 x 96 and 500 steps
softplus varied by 0.05 bits per byte from seed to seed, gelu and geglu by 0.004.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
TINY = 1e-24  # a variance of figures that do not vary at all
DRAWS = 10_000


@dataclass(frozen=True)
class Noise:
    """What figures vary by once their candidate and their seed are taken out.

    Args:
        own: variance by candidate, each with `seeds` - 1 degrees of freedom.
        common: the median of them, as an estimate of what it is a median of; NaN where it cannot be known.
        degrees: of freedom of `common`; 0 where it cannot be known.
    """

    own: Mapping[str, float]
    common: float
    degrees: float
    seeds: int

    @property
    def known(self) -> bool:
        return self.degrees > 0

    @property
    def sd(self) -> float:
        """Of one figure of a candidate that is not noisier than most."""
        return math.sqrt(self.common)

    def error(self, name: str) -> float:
        """Standard error of a candidate's mean."""
        return math.sqrt(max(self.common, self.own[name]) / self.seeds)

    def of_difference(self, first: str, second: str) -> tuple[float, float]:
        """Standard error of the difference of two means, and its degrees of freedom (Satterthwaite 1946)."""
        squares = [max(self.error(name) ** 2, TINY) for name in (first, second)]
        degrees = [self.seeds - 1 if self.own[name] > self.common else self.degrees for name in (first, second)]
        whole = sum(squares)
        return math.sqrt(whole), whole**2 / sum(each**2 / n for each, n in zip(squares, degrees, strict=True))


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
    if candidates < 2 or seeds < 2:
        return Noise(dict.fromkeys(values, math.nan), math.nan, 0, seeds)
    rest = y - y.mean(axis=1, keepdims=True)
    rest -= np.median(rest, axis=0, keepdims=True)  # the seeds' effects; a mean would be the noisiest candidate's
    rest -= rest.mean(axis=1, keepdims=True)
    own = (rest**2).sum(axis=1) * candidates / (candidates - 1) / (seeds - 1)
    # A variance of few degrees of freedom has its median below its mean: of two at 0.69 of it.
    common = float(np.median(own)) * (seeds - 1) / float(stats.chi2.median(seeds - 1))
    # A median tells about half of what a mean does.
    return Noise(dict(zip(values, own.tolist(), strict=True)), common, (candidates - 1) * (seeds - 1) / 2, seeds)


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
    errors = [known.of_difference(first, second) for first, second in pairs]
    alone = [
        float(2 * stats.t.sf(abs(value) / error, degrees))
        for value, (error, degrees) in zip(found, errors, strict=True)
    ]
    p = holm(alone)
    # The procedure compares the k-th smallest of n with LEVEL / (n - k + 1), and stops at the first that is not below.
    real = sum(each < LEVEL for each in p)
    result = []
    for value, own, adjusted, (error, degrees) in zip(found, alone, p, errors, strict=True):
        step = min(sum(other < own for other in alone), real)
        reach = float(stats.t.ppf(1 - LEVEL / 2 / (len(found) - min(step, len(found) - 1)), degrees)) * error
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
    ours: Mapping[str, float], published: Mapping[str, float], errors: Mapping[str, float], seed: int = 0
) -> RankCorrelation:
    """Over the names that both have.

    Args:
        errors: standard error of our means, by name; NaN where it is not known.
    """
    names = tuple(name for name in published if name in ours)
    x, y = (np.array([table[name] for name in names]) for table in (ours, published))
    theirs = stats.rankdata(y)
    rng = np.random.default_rng(seed)
    value = float(_correlation(stats.rankdata(x)[None], theirs)[0])
    scale = np.array([errors[name] for name in names])
    if np.isnan(scale).any():
        low = high = math.nan
    else:
        drawn = x + rng.normal(size=(DRAWS, len(x))) * scale
        low, high = np.percentile(_correlation(stats.rankdata(drawn, axis=1), theirs), [2.5, 97.5]).tolist()
    shuffled = rng.permuted(np.tile(stats.rankdata(x), (DRAWS, 1)), axis=1)
    as_good = _correlation(shuffled, theirs) >= value - 1e-12
    return RankCorrelation(names, value, low, high, float((as_good.sum() + 1) / (DRAWS + 1)))


def _correlation(ranks: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's of each row of ranks [N, n] with ranks [n]."""
    a, b = ranks - ranks.mean(axis=1, keepdims=True), theirs - theirs.mean()
    product: NDArray[np.float64] = (a @ b) / np.sqrt((a**2).sum(axis=1) * (b**2).sum())
    return product
