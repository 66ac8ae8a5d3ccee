"""Sums to intervals that hold at every look at once: an experiment is watched while it runs.

The unit is the key, since keys and not requests are assigned: a key's requests resemble each other. K keys, of which
key k has n_k values that add up to s_k; the arm's mean is r = sum s / sum n, and its variance that of keys,

    v = sum_k (s_k - r n_k)^2 / (sum n)^2 * K / (K - 1)                               (the delta method)

The interval is the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Time-uniform
central limit theory and asymptotic confidence sequences (Annals of Statistics 2024, arXiv:2103.06476, theorem 2.2 and,
for a difference of means under random assignment, section 3): with t keys and sd^2 = t v it is, at all t at once,

    sd sqrt(2 (t rho^2 + 1) / (t rho)^2 log(sqrt(t rho^2 + 1) / alpha))

It is asymptotic: what a few keys say is not judged at all. The check of shares is the sequential test of
Lindon & Malek, Anytime-valid inference for multinomial count data (NeurIPS 2022, arXiv:2011.03567), which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
# Fewer keys of an arm are not judged: below it an estimate of the variance is no variance yet. tests/test_experiments_
# statistics.py watches skewed latencies from here on at each key, and sees fewer false alarms than ALPHA.
LEAST_KEYS = 50
# Where the interval is tightest. From 400 keys to 50,000 it is at most 11 % wider than one made for them.
TIGHT_AT = 2_000
SHARE_ALPHA = 0.01  # a wrong split voids everything, so it is said of 1 experiment in 100 that has none
SHARE_PRIOR = 100.0  # keys' worth of belief in the planned shares


@dataclass(frozen=True)
class Sums:
    """Of one arm's keys: how many, and over them the sums of n_k, s_k, s_k^2, s_k n_k, n_k^2."""

    keys: int = 0
    n: float = 0.0
    s: float = 0.0
    ss: float = 0.0
    sn: float = 0.0
    nn: float = 0.0

    @property
    def mean(self) -> float:
        return self.s / self.n

    @property
    def variance(self) -> float:
        """Of the mean."""
        r = self.mean
        return max(0.0, self.ss - 2 * r * self.sn + r * r * self.nn) / self.n**2 * self.keys / (self.keys - 1)


@dataclass(frozen=True)
class Interval:
    estimate: float
    low: float
    high: float


def rho(alpha: float) -> float:
    """The one whose interval is tightest at TIGHT_AT keys (their equation for rho, appendix B.2)."""
    log = -2 * math.log(alpha)
    return math.sqrt((log + math.log(log + 1)) / TIGHT_AT)


def half_width(variance: float, keys: int, alpha: float) -> float:
    """Of the interval around an estimate of that variance from so many keys."""
    spread = keys * rho(alpha) ** 2
    return math.sqrt(variance * 2 * (spread + 1) / spread * math.log(math.sqrt(spread + 1) / alpha))


def difference(arm: Sums, baseline: Sums, alpha: float) -> Interval | None:
    """The arm's mean minus the baseline's; None while either has too few keys."""
    if min(arm.keys, baseline.keys) < LEAST_KEYS:
        return None
    # Few keys of a long tail hold none of it: they then have a low mean and a low variance together, and look sure. So
    # an arm's keys are taken to vary as much as the other's: of skewed ones, a tenth in one arm, it took false alarms
    # from 8 % to under 1.
    of_a_key = max(arm.variance * arm.keys, baseline.variance * baseline.keys)
    variance = of_a_key * (1 / arm.keys + 1 / baseline.keys)
    return _around(arm.mean - baseline.mean, variance, arm.keys + baseline.keys, alpha)


def mean(sums: Sums, alpha: float) -> Interval | None:
    """Of one arm; None while it has too few keys."""
    return _around(sums.mean, sums.variance, sums.keys, alpha) if sums.keys >= LEAST_KEYS else None


def _around(estimate: float, variance: float, keys: int, alpha: float) -> Interval:
    half = half_width(variance, keys, alpha)
    return Interval(estimate, estimate - half, estimate + half)


def share_p_value(keys: Sequence[int], shares: Sequence[float]) -> float:
    """That the planned shares give such counts; may be looked at as often as one likes.

    1 over the Bayes factor of Dirichlet(a), a = SHARE_PRIOR * shares, against the shares themselves:

        B(a + keys) / B(a) / prod shares^keys,   log B(a) = sum lgamma(a) - lgamma(sum a)
    """
    prior = [SHARE_PRIOR * share for share in shares]
    log_factor = _log_beta([a + n for a, n in zip(prior, keys, strict=True)]) - _log_beta(prior)
    log_factor -= math.fsum(n * math.log(share) for n, share in zip(keys, shares, strict=True))
    return math.exp(min(0.0, -log_factor))


def _log_beta(a: Sequence[float]) -> float:
    return math.fsum(map(math.lgamma, a)) - math.lgamma(math.fsum(a))
