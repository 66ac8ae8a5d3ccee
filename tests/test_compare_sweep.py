"""The knee and the goodput of simulated queues, whose knees are known, and how the sweep comes to its rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loadtest.compare.design import Design
from loadtest.compare.knee import Block, best_goodput, bound_of, knees, sweep
from loadtest.compare.sweep import AROUND, FIRST_PASS, next_rates


def _queue(arm: str, rate: float, mean_ms: float, order: np.random.Generator, window_s: float, poisson: bool) -> Block:
    """One server, first come first served, empty at first; of the times a third is discarded."""
    count = int(rate * window_s * 1.5)
    gaps = order.exponential(1 / rate, count) if poisson else np.full(count, 1 / rate)
    taken = order.exponential(mean_ms / 1000, count) if poisson else np.full(count, mean_ms / 1000)
    came = np.cumsum(gaps)
    free, left = 0.0, np.empty(count)
    for at in range(count):
        free = max(free, came[at]) + taken[at]
        left[at] = free
    latencies = (left - came)[came >= window_s / 2] * 1000
    return Block(arm, rate, window_s, latencies, len(latencies), 0)


def _blocks(
    arm: str, rates: list[float], mean_ms: float, *, window_s: float, poisson: bool, each: int = 5
) -> list[Block]:
    order = np.random.default_rng(7)
    return [_queue(arm, rate, mean_ms, order, window_s, poisson) for rate in rates for _ in range(each)]


RATES = [*map(float, range(25, 125, 5))]


def test_the_knee_of_a_queue_is_where_theory_has_it() -> None:
    """M/M/1: the time in the system is exponential with rate mu - lambda, so p99 = ln(100) / (mu - lambda)."""
    blocks, bound_ms = _blocks("a", RATES, 10, window_s=60, poisson=True), 100.0
    expected = 100 - math.log(100) / 0.1  # 53.9/s
    knee = knees(blocks, bound_ms, seed=0)["a"]
    assert knee["rate"] == pytest.approx(expected, rel=0.06)
    assert knee["low"] <= knee["rate"] <= knee["high"]
    assert knee["high"] - knee["low"] < 0.25 * expected
    # A server a fifth slower has its knee where its own theory has it, and the intervals part.
    slower = knees([*blocks, *_blocks("b", RATES, 12, window_s=60, poisson=True)], bound_ms, seed=0)["b"]
    assert slower["rate"] == pytest.approx(1000 / 12 - math.log(100) / 0.1, rel=0.15)
    assert slower["high"] < knee["low"]


def test_with_constant_arrivals_the_knee_is_the_capacity() -> None:
    blocks = _blocks("a", RATES, 10, window_s=20, poisson=False)
    knee = knees(blocks, bound_ms=50, seed=0)["a"]
    assert 100 <= knee["rate"] <= 105  # at 105/s the queue grows by 5 % of 20 s
    rows = {row["rate"]: row for row in sweep(blocks, objective_ms=50)}
    assert rows[100]["p99_ms"] == pytest.approx(10, abs=0.01)
    assert rows[100]["goodput_per_s"] == pytest.approx(100, rel=0.01)
    assert rows[120]["p99_ms"] > 1000
    assert rows[120]["goodput_per_s"] < 30  # nearly all wait longer
    assert best_goodput([*rows.values()])["a"]["rate"] == 100


def test_a_knee_outside_of_the_rates_is_not_made_up() -> None:
    blocks = _blocks("a", [40, 60, 80], 10, window_s=20, poisson=False)
    assert knees(blocks, bound_ms=50, seed=0)["a"] == {"rate": None, "low": None, "high": None}  # never over it
    assert knees(blocks, bound_ms=5, seed=0)["a"] == {"rate": None, "low": None, "high": None}  # always


def test_one_disturbed_block_at_a_low_rate_does_not_end_the_curve() -> None:
    blocks = _blocks("a", RATES, 10, window_s=20, poisson=False)
    disturbed = [
        Block("a", block.rate, block.window_s, block.latencies_ms + (60 if n == 7 else 0), block.requests, 0)
        for n, block in enumerate(blocks)
    ]
    knee = knees(disturbed, bound_ms=50, seed=0)["a"]
    assert knee["rate"] > 60
    assert knee["high"] >= 100


def test_a_plan_that_is_not_kept_is_over_the_bound_however_fast_the_answers() -> None:
    def block(rate: float, requests: int, starved: int) -> Block:
        return Block("a", rate, 1.0, np.full(100, 10.0), requests, starved)

    fine = [block(50, 100, 0), block(60, 100, 1), block(70, 101, 0)]
    for bad in (block(80, 100, 2), block(80, 102, 0)):  # 2 % waited for a user; 2 % failed
        assert [row["kept_plan"] for row in sweep([*fine, bad], 50)] == [True, True, True, False]
        knee = knees([*fine, bad], bound_ms=50, seed=0)["a"]
        assert 70 < knee["rate"] < 80
    nothing = Block("a", 80.0, 1.0, np.empty(0), 0, 0)
    (row,) = sweep([nothing], 50)
    assert (row["kept_plan"], row["goodput_per_s"], row["p99_ms"]) == (False, 0, None)


def test_the_bound_that_nobody_gave_is_the_baselines_for_all() -> None:
    blocks = _blocks("a", [40, 80], 10, window_s=20, poisson=False) + _blocks("b", [40], 12, window_s=20, poisson=False)
    assert bound_of(blocks, "a") == pytest.approx(50, rel=0.01)
    assert bound_of(blocks, "b") == pytest.approx(60, rel=0.01)


def test_blocks_of_one_rate_are_taken_together() -> None:
    blocks = [Block("a", 10.0, 2.0, np.full(10, ms), 10, 0) for ms in (1.0, 3.0)]
    (row,) = sweep(blocks, objective_ms=2)
    assert (row["p50_ms"], row["blocks"]) == (2.0, 2)
    assert (row["goodput_per_s"], row["requests_per_s"]) == (2.5, 5.0)  # of 20 in 4 s


# --- the rates of a sweep ---------------------------------------------------------------------------------------------

DESIGN = Design(("a", "b"), 1.0, 1.0, 0.2, 4, None, "poisson", 0, 30.0, 0.02, False)


def _swept(carried: dict[str, float], mean_ms: dict[str, float], passes: int, bound_ms: float | None = None) -> Any:
    """(rates of each step, blocks) of a sweep over queues with constant arrivals."""
    order, steps, taken = np.random.default_rng(3), list[dict[str, Any]](), []
    blocks: list[Block] = []
    for _ in range(1 + len(FIRST_PASS) + passes * len(AROUND)):
        rates = next_rates(steps, lambda: blocks, DESIGN, bound_ms)
        assert [*rates] == [*DESIGN.arms]
        taken.append(rates)
        each = [{"arm": arm, "rate": rate, "carried_per_s": carried[arm[0]]} for arm, rate in rates.items()]
        steps.append({"blocks": each})
        measured = ((arm, rate) for arm, rate in rates.items() if rate is not None)
        blocks.extend(_queue(arm, rate, mean_ms[arm[0]], order, 2.0, poisson=False) for arm, rate in measured)
    return taken, blocks


def test_a_sweep_closes_in_on_each_arms_knee() -> None:
    taken, blocks = _swept({"a": 95.0, "b": 80.0}, {"a": 10.0, "b": 12.5}, passes=3)
    assert {*taken[0].values()} == {None}  # a closed loop
    first = [rates["a"] for rates in taken[1 : 1 + len(FIRST_PASS)]]
    assert first == pytest.approx([95 * share for share in FIRST_PASS], rel=1e-3)
    assert first == sorted(first)
    found = knees(blocks, bound_of(blocks, "a"), seed=0)
    # In 2 s and 1 s before, a queue fed at 1.02 of what it carries waits 60 ms: so far the knee may lie above.
    for arm, capacity in (("a", 100), ("a:again", 100), ("b", 80)):
        assert capacity * 0.97 <= found[arm]["rate"] <= capacity * 1.05
        last = sorted(rates[arm] for rates in taken[-len(AROUND) :])
        assert last[0] < capacity < last[-1]
    # What two passes have in common adds up.
    assert max(row["blocks"] for row in sweep(blocks, 50)) >= 2


@pytest.mark.parametrize("wrong", [0.4, 2.5])
def test_a_sweep_finds_a_knee_that_the_closed_loop_missed(wrong: float) -> None:
    _, blocks = _swept({"a": 100 * wrong, "b": 80 * wrong}, {"a": 10.0, "b": 12.5}, passes=4, bound_ms=50)
    found = knees(blocks, 50, seed=0)
    assert found["a"]["rate"] == pytest.approx(101, rel=0.04)
    assert found["b"]["rate"] == pytest.approx(81, rel=0.04)
