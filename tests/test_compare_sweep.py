"""The knee and the goodput of simulated queues, whose knees are known, and how the sweep comes to its rates.

Nothing here waits: the sweep's clock is the queues' own, so that no busy machine moves a figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from compare_runs import TRUTH, write_run
from kept_comparisons import Silent

import loadtest.compare.sweep as sweeping
from loadtest.compare import driver, store
from loadtest.compare.design import Design, Visit
from loadtest.compare.driver import Comparison
from loadtest.compare.generator import Place, Seen
from loadtest.compare.knee import Block, best_goodput, bound_of, knees, sweep
from loadtest.compare.sweep import AROUND, FIRST_PASS, next_rates
from loadtest.compare.wire import ROW
from loadtest.compare.workloads import Request, Workload


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
    rates = RATES[:11]  # to 75/s; beyond, both are far over the bound
    blocks, bound_ms = _blocks("a", rates, 10, window_s=60, poisson=True), 100.0
    expected = 100 - math.log(100) / 0.1  # 53.9/s
    knee = knees(blocks, bound_ms, seed=0)["a"]
    assert knee["rate"] == pytest.approx(expected, rel=0.06)
    assert knee["low"] <= knee["rate"] <= knee["high"]
    assert knee["high"] - knee["low"] < 0.25 * expected
    # A server a fifth slower has its knee where its own theory has it, and the intervals part.
    slower = knees([*blocks, *_blocks("b", rates, 12, window_s=60, poisson=True)], bound_ms, seed=0)["b"]
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
    assert knees(blocks, bound_ms=50, seed=0)["a"] == {
        "rate": None,
        "low": None,
        "high": None,
        "few": False,
    }  # never over it
    assert knees(blocks, bound_ms=5, seed=0)["a"] == {"rate": None, "low": None, "high": None, "few": False}  # always


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


def _exponential(rate: float, mean_ms: float, order: np.random.Generator) -> Block:
    return Block("a", rate, 2.0, order.exponential(mean_ms, 100), 100, 0)


def test_one_block_at_each_rate_gives_no_interval_and_says_so() -> None:
    order = np.random.default_rng(5)
    alone = [_exponential(rate, mean_ms, order) for rate, mean_ms in ((50, 5.0), (60, 10.0), (70, 30.0), (80, 60.0))]
    knee = knees(alone, bound_ms=80, seed=0)["a"]
    assert 60 < knee["rate"] < 70
    assert knee == {"rate": knee["rate"], "low": None, "high": None, "few": True}
    # A second block at a rate beside the knee is something to go by, one far from it is not.
    assert knees([*alone, _exponential(80, 60, order)], bound_ms=80, seed=0)["a"]["few"]
    assert not knees([*alone, _exponential(70, 30, order)], bound_ms=80, seed=0)["a"]["few"]


def test_the_answers_of_a_block_are_drawn_anew_too() -> None:
    """Equal blocks have no spread among them, but a p99 of 100 answers has much."""
    order = np.random.default_rng(5)
    pairs = ((50, 5.0), (60, 10.0), (70, 30.0), (80, 60.0))
    blocks = [block for rate, mean_ms in pairs for block in [_exponential(rate, mean_ms, order)] * 3]
    knee = knees(blocks, bound_ms=80, seed=0)["a"]
    assert knee["high"] - knee["low"] > 1


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


# --- a sweep in a run's folder ----------------------------------------------------------------------------------------

MEAN_MS = {"gelu": 10.0, "relu": 12.5}
STEP_S = 3 * (sweeping.SETTLE_S + sweeping.BLOCK_S)  # a visit of each of three arms


class _Queues:
    """Stands for Locust: one server, first come first served, that takes a model's `MEAN_MS` for each answer."""

    def __init__(self, clock: list[float], late_ms: Callable[[Visit], float], failing: Callable[[Visit], bool]) -> None:
        self.clock, self.late_ms, self.failing = clock, late_ms, failing

    def __enter__(self) -> _Queues:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def visit(self, visit: Visit, on: Callable[[str, float], None]) -> Seen:
        taken_s = MEAN_MS[visit.model] / 1000
        if visit.rate is None:  # all users wait but the one that is answered
            planned = np.arange(0, visit.load_s, taken_s)
            latencies_ms = np.full(len(planned), visit.users * taken_s * 1000)
            late_ms = 0.0
        else:
            planned, late_ms = np.arange(0, visit.load_s, 1 / visit.rate), self.late_ms(visit)
            free_s, left_s = 0.0, []
            for at_s in planned:
                free_s = max(free_s, at_s) + taken_s
                left_s.append(free_s)
            latencies_ms = (np.array(left_s) - planned) * 1000
        self.clock[0] += visit.load_s
        nothing = dict.fromkeys(ROW, math.nan)
        failure = "refused" if self.failing(visit) else ""
        rows = [
            nothing
            | {"worker": "w0", "prompt": 0, "planned_s": at_s, "at_s": at_s + late_ms / 1000, "latency_ms": latency_ms}
            | {"late_ms": late_ms, "starved": 0, "tokens": 0, "settling": at_s < visit.settle_s, "failure": failure}
            for at_s, latency_ms in zip(planned.tolist(), latencies_ms.tolist(), strict=True)
        ]
        return Seen(rows, 0.1)


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Design]:
    """Sweeps, in the folder of a run that is complete, for so many steps."""
    folder, clock = (
        write_run(tmp_path / "run", truth={model: TRUTH[model] for model in MEAN_MS}, void=(), rounds=3),
        [0.0],
    )
    design = Design.of_json(store.run_of(folder)["design"])
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def thinking(*arguments: Any) -> dict[str, float | None]:
        clock[0] += 1.0  # between two steps, and of neither
        return next_rates(*arguments)

    monkeypatch.setattr(sweeping, "next_rates", thinking)

    def run(
        steps: int,
        objective_ms: float | None,
        late_ms: Callable[[Visit], float] = lambda _: 0.0,
        failing: Callable[[Visit], bool] = lambda _: False,
        ended: str = "",
    ) -> Design:
        monkeypatch.setattr(sweeping, "Generator", lambda *_: _Queues(clock, late_ms, failing))
        workload, place = Workload("", (Request("x"),), 10), Place()
        comparison = Comparison(design, workload, folder, "", None, None, lambda _: None, place, Silent())
        assert sweeping.measure(comparison, steps * STEP_S / 60, objective_ms) == ended
        return design

    return run


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / sweeping.FOLDER / store.ROUNDS).glob("*.json"))


@pytest.mark.parametrize("objective_ms", [60.0, None])
def test_a_sweep_finds_what_a_server_carries(
    objective_ms: float | None, swept: Callable[..., Design], tmp_path: Path
) -> None:
    design = swept(1 + len(FIRST_PASS) + 2 * len(AROUND), objective_ms)
    assert len(_steps(tmp_path / "run")) == 1 + len(FIRST_PASS) + 2 * len(AROUND)
    result = sweeping.result(tmp_path / "run", design, objective_ms)
    assert result["objective_given"] == (objective_ms is not None)
    assert result["objective_ms"] == pytest.approx(objective_ms or 50, rel=1e-3)
    for arm in design.arms:
        capacity = 1000 / MEAN_MS[design.model_of(arm)]
        rows = [row for row in result["sweep"] if row["arm"] == arm]
        assert len(rows) >= len(FIRST_PASS)
        assert all(row["kept_plan"] for row in rows)
        assert capacity * 0.97 <= result["knee"][arm]["rate"] <= capacity * 1.05
        assert capacity * 0.9 <= result["goodput"][arm]["per_s"] <= capacity * 1.05
    assert sweeping.said(tmp_path / "run", design, None) == []


def test_a_sweep_goes_on_where_it_was_killed(swept: Callable[..., Design], tmp_path: Path) -> None:
    """A step that is not whole is taken again as it was, and only what is missing is measured."""
    steps = 3 + len(FIRST_PASS)
    design = swept(steps, 60)
    whole = {path: path.read_bytes() for path in (tmp_path / "run" / sweeping.FOLDER / store.ROUNDS).iterdir()}
    *kept, torn, lost = _steps(tmp_path / "run")
    for path in (lost, lost.with_suffix(".parquet"), torn):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    swept(steps, 60)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    again = {path: path.read_bytes() for path in (tmp_path / "run" / sweeping.FOLDER / store.ROUNDS).iterdir()}
    assert {path: data for path, data in again.items() if path.suffix == ".json"} == {
        path: data for path, data in whole.items() if path.suffix == ".json"
    }
    assert {*again} == {*whole}
    swept(steps, 60)
    assert len(_steps(tmp_path / "run")) == steps
    assert sweeping.missing_s(tmp_path / "run", steps * STEP_S / 60) == 0
    assert sweeping.result(tmp_path / "run", design, 60)["knee"]["gelu"]["rate"] > 90


def test_a_client_too_slow_for_the_baseline_leaves_no_result_and_says_so(
    swept: Callable[..., Design], tmp_path: Path
) -> None:
    """Nobody gave an objective, so that the bound, and every arm's next rates, are the baseline's to say."""
    steps = 2 + len(FIRST_PASS) + len(AROUND)
    design = swept(steps, None, lambda visit: 60.0 if visit.model == "gelu" else 0.0)
    assert len(_steps(tmp_path / "run")) == steps
    assert sweeping.result(tmp_path / "run", design, None) == {}
    slow, nothing = sweeping.said(tmp_path / "run", design, None)
    assert slow.startswith(f"{2 * (steps - 1)} of {3 * (steps - 1)} blocks of the sweep of rates do not count: client")
    assert "no block of gelu counts" in nothing
    # One that counts is enough.
    swept(steps + 1, None)
    assert [
        row["blocks"] for row in sweeping.result(tmp_path / "run", design, None)["sweep"] if row["arm"] == "gelu"
    ] == [1]
    assert len(sweeping.said(tmp_path / "run", design, None)) == 1


def test_each_request_of_a_step_is_kept_with_the_time_at_which_it_left(
    swept: Callable[..., Design], tmp_path: Path
) -> None:
    swept(2, 60)
    samples = pl.read_parquet(_steps(tmp_path / "run")[1].with_suffix(".parquet"))
    first = samples.group_by("position").agg(pl.col("planned_s").min()).sort("position")["planned_s"].to_list()
    assert first == pytest.approx([position * (sweeping.SETTLE_S + sweeping.BLOCK_S) for position in range(3)])


def test_a_server_that_dies_in_a_sweep_ends_it_and_its_step_is_not_kept(
    swept: Callable[..., Design], tmp_path: Path
) -> None:
    """No server listens at the comparison's URL: a request that failed says that it is gone."""
    steps = 1 + len(FIRST_PASS) + len(AROUND)
    died = iter([False] * (3 * (steps - 2) + 1) + [True] * 3)
    design = swept(
        steps,
        60,
        failing=lambda _: next(died),
        ended="the sweep of rates ended early: the server at  no longer answers",
    )
    assert len(_steps(tmp_path / "run")) == steps - 2
    swept(steps, 60)
    assert len(_steps(tmp_path / "run")) == steps
    assert all(row["kept_plan"] for row in sweeping.result(tmp_path / "run", design, 60)["sweep"])


def test_a_baseline_that_answers_nothing_leaves_no_result_and_says_so(
    swept: Callable[..., Design], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served, but refuses: where nobody gave an objective there is no bound, and no JSON has an infinite one."""
    monkeypatch.setattr(driver, "ready", lambda url: True)
    design = swept(4, None, failing=lambda visit: visit.rate is not None and visit.model == "gelu")
    assert sweeping.result(tmp_path / "run", design, None) == {}
    (sentence,) = sweeping.said(tmp_path / "run", design, None)
    assert "gelu answered nothing at its lowest rate" in sentence
    result = sweeping.result(tmp_path / "run", design, 60.0)  # somebody gave one
    assert result["objective_ms"] == 60
    json.dumps(result, allow_nan=False)
    assert sweeping.said(tmp_path / "run", design, 60.0) == []
