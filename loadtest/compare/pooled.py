"""All answers of an arm over all of the baseline's -> what a typical block cannot show: tails, means, totals.

A block holds 10 to 60 answers: its p99 is nearly its slowest one, and a location that is robust against disturbed
blocks cuts away those that hold a rare slow answer. Of 300 rounds of 20 answers, 1.5 % of the arm's 10 times slower, a
typical block's p99 says +2 % and its mean +1 %, where the truth is 7.4 times and +13 %. So these take the answers of an
arm's blocks together, and those of both of the baseline's; whole rounds are drawn anew, the same ones for both sides.

The interval is, as in `statistics.py`, the standard error times Student's t: an early look asks for levels of which a
thousand resamples have no percentile.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import polars as pl

from loadtest.compare.design import AGAIN, Design
from loadtest.compare.sequential import Array
from loadtest.compare.statistics import LEAST_ROUNDS, RESAMPLES, Estimate

ANSWERS: Final = pl.col("requests_per_s") * pl.col("window_s")
# By measure: the column of a block, and what a block of it weighs.
MEANS: Final = {
    "mean": ("mean_ms", ANSWERS),
    "throughput": ("requests_per_s", pl.col("window_s")),
    "cpu": ("cpu_ms", ANSWERS),
    "tokens_per_s": ("tokens_per_s", pl.col("window_s")),
}
# By measure: the column of `_answers`, and the share of answers that took no longer.
TAILS: Final = {"p90": ("ms", 0.9), "p99": ("ms", 0.99), "uncorrected_p99": ("uncorrected_ms", 0.99)}


def estimates(
    counted: pl.DataFrame, samples: pl.DataFrame | pl.LazyFrame | None, design: Design, seed: int
) -> dict[str, dict[str, Estimate]]:
    """By variant and measure. One that cannot be told is left out: the tails where there are no samples.

    The error is infinite where there are too few rounds for an interval.
    """
    found: dict[str, dict[str, Estimate]] = {model: {} for model in design.models[1:]}
    rounds = np.unique(counted["round"].to_numpy())
    if not rounds.size:
        return found
    drawn = np.random.default_rng(seed).multinomial(rounds.size, np.full(rounds.size, 1 / rounds.size), RESAMPLES)
    times = np.vstack([np.ones((1, rounds.size), dtype=np.int64), drawn])  # each round as it was, then drawn anew
    for name, (column, weight) in MEANS.items():
        if column in counted.columns:
            for model, measures in found.items():
                _add(
                    measures,
                    name,
                    _means(counted, column, weight, (design.baseline, model), rounds, times),
                    rounds.size,
                )
    if samples is None:
        return found
    answers = _answers(samples, rounds)
    for column in dict.fromkeys(column for column, _ in TAILS.values()):
        names = [name for name, (of, _) in TAILS.items() if of == column]
        shares = np.array([TAILS[name][1] for name in names])
        quantiles = {
            model: _quantiles(answers.filter(_is(model)), column, shares, rounds, times) for model in design.models
        }
        for model, measures in found.items():
            for at, name in enumerate(names):
                _add(measures, name, (quantiles[model][:, at], quantiles[design.baseline][:, at]), rounds.size)
    return found


def _is(model: str) -> pl.Expr:
    """The baseline's blocks are those of both of its arms."""
    return pl.col("arm").is_in([model, model + AGAIN])


def _add(measures: dict[str, Estimate], name: str, sides: tuple[Array, Array], rounds: int) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratios = np.log(sides[0]) - np.log(sides[1])
    if not math.isfinite(log_ratios[0]):
        return
    sure = rounds >= LEAST_ROUNDS and bool(np.isfinite(log_ratios).all())
    error = float(np.std(log_ratios[1:], ddof=1)) if sure else math.inf
    measures[name] = Estimate(float(log_ratios[0]), error, rounds)


def _means(
    counted: pl.DataFrame, column: str, weight: pl.Expr, models: tuple[str, str], rounds: Array, times: Array
) -> tuple[Array, Array]:
    """Of the second of `models`, and of the baseline. A round in which a block of theirs has no value is left out."""
    value = pl.col(column).cast(pl.Float64)
    blocks = (
        counted.filter(pl.any_horizontal(_is(model) for model in models))
        .filter((value.is_finite() & (value > 0)).fill_null(value=False).all().over("round"))
        .select("round", "arm", (value * weight).alias("sum"), weight.alias("weight"))
    )

    def mean(model: str) -> Any:
        its = blocks.filter(_is(model)).group_by("round").agg(pl.col("sum", "weight").sum()).sort("round")
        at = np.searchsorted(rounds, its["round"].to_numpy())
        with np.errstate(divide="ignore", invalid="ignore"):
            return (times[:, at] @ its["sum"].to_numpy()) / (times[:, at] @ its["weight"].to_numpy())

    return mean(models[1]), mean(models[0])


def _answers(samples: pl.DataFrame | pl.LazyFrame, rounds: Array) -> pl.DataFrame:
    """Those that went well, of the rounds that count."""
    return (
        samples.lazy()
        .filter(~pl.col("settling") & (pl.col("failure") == "") & pl.col("round").is_in(rounds.tolist()))
        .select(
            "round",
            "arm",
            (pl.col("latency_ms") + pl.col("late_ms")).alias("ms"),
            pl.col("latency_ms").alias("uncorrected_ms"),
        )
        .collect()
    )


def _quantiles(answers: pl.DataFrame, column: str, shares: Array, rounds: Array, times: Array) -> Array:
    """[rows of `times`, shares]: each row says how often each round's answers are there."""
    if not answers.height:
        return np.full((len(times), len(shares)), math.nan)
    ordered = answers.sort(column)
    values, at = ordered[column].to_numpy(), np.searchsorted(rounds, ordered["round"].to_numpy())
    found = np.empty((len(times), len(shares)))
    for row, each in enumerate(times):
        upto = np.cumsum(each[at])
        found[row] = values[np.searchsorted(upto, shares * upto[-1])]
    return found
