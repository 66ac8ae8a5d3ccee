"""Blocks of load at several rates -> latency and goodput at each rate, and each arm's knee.

The knee is the highest rate at which p99, from the planned time, stays within a bound and the plan is kept. Between
the rates that were measured it is where the curve of log p99 crosses the bound; the curve is made to rise (isotonic
regression), so that one disturbed block at a low rate does not end it. Its interval is of the blocks of each rate drawn
anew, and the answers in each of them. Answers of one block wait for each other, so that alone they say too little of
how far the next block would be from it: where no rate beside the knee has a second block, there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.samples import KEPT_SHARE

RESAMPLES = 400
LEVEL = 0.95
# How far above the bound counts: in a queue that grows, p99 is a matter of the block's length alone.
FAR = 10.0
BOUND_OF_IDLE = 5.0  # times the median of the lowest rate, where nobody gave a bound


@dataclass(frozen=True, eq=False)
class Block:
    """What one block at one rate came to."""

    arm: str
    rate: float  # planned arrivals per second
    window_s: float
    latencies_ms: NDArray[np.float64]  # from the planned time; of the answers that went well
    requests: int  # the failed ones too
    starved: int  # of them, those that found no user free at their planned time


def sweep(blocks: Sequence[Block], objective_ms: float) -> list[dict[str, Any]]:
    """One row for each arm and rate, its blocks taken together.

    Args:
        objective_ms: an answer within it, from the planned time, is good.
    """
    rows = []
    for (arm, rate), its in by_rate(blocks).items():
        latencies = np.concatenate([block.latencies_ms for block in its])
        p50, p99 = _percentiles(latencies)
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "p50_ms": p50 if latencies.size else None,
                "p99_ms": p99 if latencies.size else None,
                "goodput_per_s": round(_goodput_per_s(its, objective_ms), 3),
                "requests_per_s": round(len(latencies) / sum(block.window_s for block in its), 3),
                "kept_plan": _kept_plan(its),
                "blocks": len(its),
            }
        )
    return sorted(rows, key=lambda row: (row["arm"], row["rate"]))


def knees(blocks: Sequence[Block], bound_ms: float, seed: int) -> dict[str, dict[str, float | bool | None]]:
    """By arm: `rate`, and the interval `low` to `high`. None for what lies outside of the rates that were measured.

    `few`: the rates beside the knee have one block each, too few for an interval.
    """
    found: dict[str, dict[str, float | bool | None]] = {}
    for arm in dict.fromkeys(block.arm for block in blocks):
        at_rate = {rate: its for (whose, rate), its in by_rate(blocks).items() if whose == arm}
        order = np.random.default_rng(seed)
        knee = knee_of(at_rate, bound_ms)
        if all(len(at_rate[rate]) == 1 for rate in _beside(at_rate, knee)):
            found[arm] = {"rate": _inside(knee), "low": None, "high": None, "few": True}
            continue
        again = [
            knee_of({rate: _drawn_anew(its, order) for rate, its in at_rate.items()}, bound_ms)
            for _ in range(RESAMPLES)
        ]
        # Below all rates is 0, above all is infinity: both have their place in the order.
        low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
        found[arm] = {"rate": _inside(knee), "low": _inside(low), "high": _inside(high), "few": False}
    return found


def _inside(knee: float) -> float | None:
    return round(float(knee), 3) if 0 < knee < math.inf else None


def _beside(rates: Iterable[float], knee: float) -> list[float]:
    """The next rate below it and the next above it; one of them where it lies outside of all."""
    below, above = [rate for rate in rates if rate <= knee], [rate for rate in rates if rate > knee]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _drawn_anew(blocks: Sequence[Block], order: np.random.Generator) -> list[Block]:
    drawn = [blocks[i] for i in order.integers(len(blocks), size=len(blocks))]
    return [
        replace(block, latencies_ms=order.choice(block.latencies_ms, len(block.latencies_ms)))
        if block.latencies_ms.size
        else block
        for block in drawn
    ]


def best_goodput(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By arm: the rate at which the most answers per second were good."""
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["goodput_per_s"] > best.get(row["arm"], {"per_s": 0.0})["per_s"]:
            best[row["arm"]] = {"rate": row["rate"], "per_s": row["goodput_per_s"]}
    return best


def bound_of(blocks: Sequence[Block], baseline: str) -> float:
    """The bound where nobody gave one: the same for all arms, from the baseline's median at its lowest rate."""
    at_rate = {rate: its for (arm, rate), its in by_rate(blocks).items() if arm == baseline}
    p50, _ = _percentiles(np.concatenate([block.latencies_ms for block in at_rate[min(at_rate)]]))
    return BOUND_OF_IDLE * p50


def knee_of(at_rate: Mapping[float, Sequence[Block]], bound_ms: float) -> float:
    """0 where p99 is over the bound at the lowest rate already, infinity where it never is."""
    from scipy.optimize import isotonic_regression  # takes half a second to import

    rates = sorted(at_rate)
    log_p99 = isotonic_regression([_log_p99(at_rate[rate], bound_ms) for rate in rates]).x
    over = np.flatnonzero(log_p99 > 0)
    if not over.size:
        return math.inf
    first = int(over[0])
    if not first:
        return 0.0
    below, above = log_p99[first - 1], log_p99[first]
    return float(rates[first - 1] + (rates[first] - rates[first - 1]) * below / (below - above))


def _log_p99(blocks: Sequence[Block], bound_ms: float) -> float:
    """log(p99 / bound); above 0 where the plan was not kept."""
    if not _kept_plan(blocks):
        return math.log(FAR)
    _, p99 = _percentiles(np.concatenate([block.latencies_ms for block in blocks]))
    return math.log(min(max(p99 / bound_ms, 1 / FAR), FAR))


def _kept_plan(blocks: Sequence[Block]) -> bool:
    """Whether the requests left as planned and were answered."""
    requests = sum(block.requests for block in blocks)
    well = sum(len(block.latencies_ms) for block in blocks)
    starved = sum(block.starved for block in blocks)
    return well >= KEPT_SHARE * requests > 0 and starved <= (1 - KEPT_SHARE) * requests


def _goodput_per_s(blocks: Sequence[Block], objective_ms: float) -> float:
    good = sum(int(np.count_nonzero(block.latencies_ms <= objective_ms)) for block in blocks)
    return good / sum(block.window_s for block in blocks)


def _percentiles(latencies_ms: NDArray[np.float64]) -> tuple[float, float]:
    if not latencies_ms.size:
        return math.inf, math.inf
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return round(float(p50), 4), round(float(p99), 4)


def by_rate(blocks: Sequence[Block]) -> dict[tuple[str, float], list[Block]]:
    found: dict[tuple[str, float], list[Block]] = {}
    for block in blocks:
        found.setdefault((block.arm, block.rate), []).append(block)
    return found
