"""Blocks of rounds -> by how much each arm is slower or faster than the baseline, and how sure that is.

    pairs      blocks of one round       -> log ratios, arm over baseline
    estimate   log ratios of all rounds  -> where they lie, with a standard error by bootstrap over rounds
    step_down  estimates of all arms     -> the level of each arm's interval (Holm)
    outcome    interval and margin       -> slower, faster, equivalent, inconclusive
    settled    a look on the way         -> whether every arm has an outcome (`sequential.py` keeps the error rate)

What was chosen, and by what. Figures are of `simulate.py` (1,000 comparisons of 60 rounds) and of one recording (240 s
of one variant, 2 users, two cores that others used at the same time), cut into blocks and dealt to arms.

- Location: the 40 % trimmed mean of log ratios. Standard error over the recording, in blocks of 0.15 s: 1.3 %; the mean
  3.3 %, the 20 % trimmed mean 1.9 %. With Gaussian noise of 3 % it costs little: 0.50 % instead of the mean's 0.45 %.
- Both blocks of the baseline, each apart: a round gives two log ratios to the trimmed mean, and is resampled whole.
  That errs by a sixth less than the first block alone (0.50 % to 0.60 %). Their average would be wrong: where one block
  in ten is disturbed, the average of two is disturbed twice as often as the arm and half as much, which a robust
  location does not balance: -0.56 % where nothing differs.
- Interval: bootstrap standard error times Student's t, which has a quantile for every level that a look may ask for.
  With all degrees of freedom, of 500 intervals of 99.5 % over 8 rounds, it missed 0.6 %, the percentile interval 5.4 %
  and BCa 5.2 %; of 95 % they missed 5.4, 9.2 and 9.6 %. From 30 rounds on they are alike.
- Neighbouring rounds may be as alike as they want: the arms of a round stand in random order, so that what the machine
  does there is as likely to make the ratio higher as lower.

Blocks should be short. Standard error after 3 minutes of three arms over the recording, by block + settling: 4.5 % at
1.0 + 0.2 s, 2.7 % at 0.5 + 0.1, 1.3 % at 0.15 + 0.05, 0.9 % at 0.05 + 0.02, since a neighbour 0.2 s away is more alike
than one 1.2 s away, and there are more of them. 0.15 + 0.05 is recommended, more where that holds under 20 answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import polars as pl
from scipy import stats

from loadtest.compare.design import AGAIN, Design
from loadtest.compare.sequential import Array, Look, nominal

Outcome = Literal["slower", "faster", "equivalent", "inconclusive"]
PRIMARY: Final = "p50_ms"  # what decides
TRIM: Final = 0.4  # of the ordered log ratios, cut from either end
RESAMPLES: Final = 999  # a standard error within 2.2 % of what endless resamples would give
LEAST_ROUNDS: Final = 6  # below that no interval: five rounds of noise all point the same way once in 16 times
LOOKS: Final = 40  # at most, over the planned rounds; each costs two bootstraps and a step of the quadrature
POWER: Final = 0.8


@dataclass(frozen=True)
class Estimate:
    """Where the log ratios of one arm lie."""

    log_ratio: float
    error: float  # standard error
    rounds: int

    @property
    def freedom(self) -> float:
        """Degrees of freedom of Student's t.

        Half of the rounds', since a trimmed mean's standard error is less sure than a mean's: with all of them, 95 %
        and 99.5 % intervals missed 6.0 and 1.2 % of 4,000 times at 30 rounds; with half, 4.8 and 0.7 % of 3,000.
        """
        return (self.rounds - 1) / 2

    def factor(self, level: float) -> float:
        """How many standard errors an interval that is wrong with chance `level` reaches to either side."""
        return float(stats.t.isf(level / 2, self.freedom))

    def interval(self, level: float) -> tuple[float, float]:
        reach = self.factor(level) * self.error if self.error else 0.0  # the factor of level 0 is infinite
        return self.log_ratio - reach, self.log_ratio + reach

    @property
    def chance(self) -> float:
        """Of an estimate at least so far from no difference where there is none."""
        if self.error == 0:
            return float(self.log_ratio == 0)
        return float(2 * stats.t.sf(abs(self.log_ratio) / self.error, self.freedom))


@dataclass(frozen=True)
class Judged:
    """An estimate and what it may be tested at."""

    estimate: Estimate
    level: float  # at this look, in this company of arms
    share: float  # of alpha, for this arm at all looks together

    @property
    def interval(self) -> tuple[float, float]:
        return self.estimate.interval(self.level)


def whole_rounds(blocks: pl.DataFrame) -> pl.DataFrame:
    """The blocks of rounds of which no block is void."""
    return blocks.filter((pl.col("void") == "").all().over("round"))


def pairs(blocks: pl.DataFrame, column: str, baseline: str, arm: str) -> Array:
    """log of arm over baseline, one row per round: [rounds, 2], over the baseline's block and over its second one.

    [rounds, 1] for the second one itself, the A/A arm. A round in which one of them has no finite value above 0 has
    no row.
    """
    over = [baseline] if arm == baseline + AGAIN else [baseline, baseline + AGAIN]
    value = pl.col(column).cast(pl.Float64)
    wide = (
        blocks.filter(pl.col("arm").is_in([arm, *over]))
        .select("round", "arm", pl.when(value.is_finite() & (value > 0)).then(value.log()).alias("log"))
        .pivot(on="arm", on_columns=[arm, *over], index="round", values="log")
        .drop_nulls()
        .sort("round")
    )
    return wide.select((pl.col(arm) - pl.col(each)).alias(f"over {each}") for each in over).to_numpy()


def location(*columns: Array, axis: int = -1) -> Any:
    """The trimmed mean of all columns together."""
    return stats.trim_mean(np.concatenate(columns, axis=axis), TRIM, axis=axis)


def estimate(log_ratios: Array, seed: int = 0) -> Estimate | None:
    """Of `pairs`; None where there are too few rounds for an interval. Resamples whole rounds."""
    rounds = len(log_ratios)
    if rounds < LEAST_ROUNDS:
        return None
    found = stats.bootstrap(
        tuple(log_ratios.T),
        location,
        n_resamples=RESAMPLES,
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Estimate(float(location(*log_ratios.T)), float(found.standard_error), rounds)


def step_down(estimates: Mapping[str, Estimate], looks: Sequence[Look], alpha: float) -> dict[str, Judged]:
    """Each arm at its level at the last of `looks`, by Holm, "A simple sequentially rejective multiple test
    procedure" (1979): of m arms the clearest is tested at alpha / m, and where it differs, the next at alpha / (m - 1).
    All from the first that does not differ on have the level of that one. So an interval excludes no difference exactly
    where Holm finds one, and in at most `alpha` of all comparisons any arm without a difference is said to have one.
    """
    judged: dict[str, Judged] = {}
    left = len(estimates)
    for arm in sorted(estimates, key=lambda arm: estimates[arm].chance):
        share = alpha / left
        judged[arm] = Judged(estimates[arm], nominal(tuple(looks), share), share)
        if differs(judged[arm].interval):
            left -= 1
    return judged


def differs(interval: tuple[float, float]) -> bool:
    low, high = interval
    return low > 0 or high < 0


def within(interval: tuple[float, float], margin: float) -> bool:
    """Whether all of it is closer to no difference than a ratio of 1 + margin: two one-sided tests in one."""
    low, high = interval
    return -math.log1p(margin) <= low and high <= math.log1p(margin)


def outcome(interval: tuple[float, float], margin: float) -> Outcome:
    """Of a latency. An interval that excludes no difference and lies within the margin is `equivalent`: surely a
    difference, surely none that matters.
    """
    if within(interval, margin):
        return "equivalent"
    if not differs(interval):
        return "inconclusive"
    return "slower" if interval[0] > 0 else "faster"


def smallest_seen(found: Estimate, level: float) -> float:
    """The difference, as a ratio less 1, that an interval of `level` would have excluded 1 for in 80 of 100 runs."""
    return math.expm1((found.factor(level) + float(stats.norm.ppf(POWER))) * found.error)


def rounds_needed(found: Estimate, margin: float, level: float) -> float:
    """Rounds in all after which, in 80 of 100 runs, the arm would have an outcome, if the truth is the estimate.

    The interval then excludes no difference, or lies within the margin, whichever takes fewer rounds. Infinite where
    neither can be, which takes a margin of 0.
    """
    distance = abs(found.log_ratio)
    reach = max(distance, math.log1p(margin) - distance)
    wanted = float(stats.norm.isf(level / 2) + stats.norm.ppf(POWER)) * found.error
    return found.rounds * (wanted / reach) ** 2 if reach > 0 else math.inf


def looks(blocks: pl.DataFrame, design: Design) -> list[Look]:
    """The looks that were taken up to the last of these blocks, which is one.

    The driver looks after each cycle, or each few where that would be more than LOOKS. With `fixed` it does not look.
    A run that has used up its rounds or its minutes may spend all that is left of its level.
    """
    ends = blocks.group_by("round").agg((pl.col("began_s") + pl.col("window_s")).max().alias("end_s"))
    end_s = ends.sort("round")["end_s"].to_list()
    counted = np.sort(whole_rounds(blocks)["round"].unique().to_numpy())

    def look(done: int) -> Look:
        # Rounds take longer than their load, so fewer may fit than planned: then time says how far the run is.
        share = max(done / design.rounds, end_s[done - 1] / (design.minutes * 60))
        over = end_s[done - 1] + design.round_s > design.minutes * 60
        return Look(int(np.searchsorted(counted, done)), 1.0 if over else min(1.0, share))

    found = [Look(0, 0.0)]
    for done in [*([] if design.fixed else range(every(design), len(end_s), every(design))), len(end_s)]:
        if done and look(done).rounds > found[-1].rounds:  # a look that sees no new round that counts is none
            found.append(look(done))
    if len(end_s) and len(found) > 1:
        found[-1] = Look(found[-1].rounds, look(len(end_s)).share)
    return found[1:]


def every(design: Design) -> int:
    """Rounds from look to look."""
    return design.cycle * math.ceil(design.rounds / (design.cycle * LOOKS))


def judge_primary(blocks: pl.DataFrame, design: Design, alpha: float, seed: int) -> dict[str, Judged]:
    """Every arm but the baseline, the A/A arm among them; empty where there are too few rounds for an interval."""
    counted = whole_rounds(blocks)
    others = [arm for arm in design.arms if arm != design.baseline]
    found = {arm: estimate(pairs(counted, PRIMARY, design.baseline, arm), seed) for arm in others}
    estimates = {arm: each for arm, each in found.items() if each is not None}
    if len(estimates) < len(others):
        return {}
    return step_down(estimates, looks(blocks, design), alpha)


def settled(blocks: pl.DataFrame, design: Design, *, alpha: float = 0.05) -> bool:
    """Asked after a full cycle of rounds: does every arm have an outcome, and the A/A arm not differ?

    An A/A arm that differs settles nothing: later rounds may show the difference to lie within the margin.
    """
    if blocks["round"].n_unique() % every(design):
        return False
    judged = judge_primary(blocks, design, alpha, design.seed)
    again = design.baseline + AGAIN
    margin = design.equivalence
    return bool(judged) and all(
        fit(each.interval, margin) if arm == again else outcome(each.interval, margin) != "inconclusive"
        for arm, each in judged.items()
    )


def fit(interval: tuple[float, float], margin: float) -> bool:
    """Whether the baseline against itself shows no difference, or none that matters."""
    return not differs(interval) or within(interval, margin)
