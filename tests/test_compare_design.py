"""The order of a comparison's visits, and what each sends: balanced, by seed, the same for all arms of a round."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.compare.design import AGAIN, Design, williams
from loadtest.compare.workloads import Request, Workload


def _design(models: tuple[str, ...] = ("a", "b", "c"), **changes: Any) -> Design:
    values: dict[str, Any] = {
        "models": models,
        "minutes": 5.0,
        "block_s": 1.0,
        "settle_s": 0.2,
        "users": 4,
        "rate": None,
    }
    values |= {"arrivals": "constant", "seed": 0, "timeout_s": 30.0, "equivalence": 0.02, "fixed": False}
    return Design(**(values | changes))


def _workload(count: int = 8, at_s: tuple[float, ...] = ()) -> Workload:
    times = at_s or (None,) * count
    return Workload("test", tuple(Request((1, 2), 0, when_s) for when_s in times), vocab_size=10)


@pytest.mark.parametrize("count", range(2, 13))
def test_rows_balance_places_and_predecessors(count: int) -> None:
    rows = williams(count)
    assert len(rows) == (count if count % 2 == 0 else 2 * count)
    each = len(rows) // count
    for place in range(count):
        assert Counter(row[place] for row in rows) == dict.fromkeys(range(count), each)
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert follows == {(a, b): each for a in range(count) for b in range(count) if a != b}


def test_rows_by_hand() -> None:
    assert williams(4) == [(0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)]


@given(count=st.integers(2, 7), seed=st.integers(0, 2**32), cycle=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_cycle_is_balanced_over_arms(count: int, seed: int, cycle: int) -> None:
    design = _design(tuple("abcdefg"[:count]), seed=seed)
    orders = [design.order(cycle * design.cycle + row) for row in range(design.cycle)]
    assert all(sorted(order) == sorted(design.arms) for order in orders)
    each = design.cycle // len(design.arms)
    for place in range(len(design.arms)):
        assert Counter(order[place] for order in orders) == dict.fromkeys(design.arms, each)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert set(follows.values()) == {each}
    assert len(follows) == len(design.arms) * (len(design.arms) - 1)


def test_orders_are_random_by_seed_and_dealt_anew_each_cycle() -> None:
    def orders(seed: int, cycle: int) -> list[tuple[str, ...]]:
        design = _design(seed=seed)
        return [design.order(cycle * design.cycle + row) for row in range(design.cycle)]

    assert orders(1, 0) == orders(1, 0)
    assert orders(1, 0) != orders(2, 0)
    assert orders(1, 0) != orders(1, 1)


def test_the_baseline_enters_twice_and_asks_for_the_same_model() -> None:
    design = _design()
    assert design.arms == ("a", "b", "c", "a" + AGAIN)
    assert [design.visit(3, arm).model for arm in design.arms] == ["a", "b", "c", "a"]


def test_as_many_rounds_as_fit_and_at_least_one() -> None:
    assert _design(minutes=1.0).rounds == 12  # of four visits of 1.2 s: 4.8 s each
    assert _design(minutes=0.01).rounds == 1


def test_a_design_comes_back_from_json() -> None:
    design = _design(rate=12.5, arrivals="poisson")
    assert Design.of_json(design.as_json()) == design


@given(
    rate=st.floats(0.5, 500),
    settle_s=st.floats(0, 1),
    block_s=st.floats(0.1, 3),
    arrivals=st.sampled_from(["constant", "poisson"]),
    number=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_arm_of_a_round_is_sent_the_same_at_the_same_times(
    rate: float, settle_s: float, block_s: float, arrivals: str, number: int
) -> None:
    design = _design(rate=rate, settle_s=settle_s, block_s=block_s, arrivals=arrivals)
    workload = _workload(count=5)
    sent = {arm: list(design.visit(number, arm).planned(workload)) for arm in design.arms}
    assert len({tuple(each) for each in sent.values()}) == 1
    times = [when_s for when_s, _ in sent["a"]]
    assert times == sorted(times)
    assert all(0 <= when_s < settle_s + block_s for when_s in times)
    first = [request for _, request in sent["a"]][:5]
    assert len(set(first)) == len(first), "each request once before any again"


def test_constant_arrivals_are_where_they_should_be() -> None:
    times = [when_s for when_s, _ in _design(rate=20.0, settle_s=0.0).visit(0, "a").planned(_workload())]
    assert times == [i / 20 for i in range(20)]


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    """Of 400 blocks of 20/s for 1.2 s: 9600 arrivals, whose count has a standard deviation of 98."""
    design = _design(rate=20.0, arrivals="poisson")
    counts = [len(list(design.visit(number, "a").planned(_workload()))) for number in range(400)]
    assert abs(sum(counts) - 9600) < 4 * 98
    mean = sum(counts) / 400
    variance = sum((count - mean) ** 2 for count in counts) / 399
    assert 0.7 < variance / mean < 1.35, "of a Poisson count they are equal; 4 sigma of 400 is 0.28"


def test_users_of_a_closed_loop_differ_and_arms_do_not() -> None:
    visits = [_design().visit(7, arm) for arm in ("a", "b")]

    def first(visit: Any, user: int) -> list[int]:
        requests = visit.requests(8, user)
        return [next(requests) for _ in range(16)]

    assert first(visits[0], 0) == first(visits[1], 0)
    assert first(visits[0], 0) != first(visits[0], 1)
    assert sorted(first(visits[0], 0)[:8]) == list(range(8))


def test_recorded_traffic_goes_on_from_round_to_round() -> None:
    design = _design(arrivals="recorded", settle_s=0.0, block_s=1.0)
    workload = _workload(at_s=(0.0, 0.4, 1.3, 1.9))
    sent = [list(design.visit(number, "a").planned(workload)) for number in range(2)]
    assert [(round(when_s, 6), request) for when_s, request in sent[0]] == [(0.0, 0), (0.4, 1)]
    assert [(round(when_s, 6), request) for when_s, request in sent[1]] == [(0.3, 2), (0.9, 3)]
    assert list(design.visit(1, "b").planned(workload)) == sent[1]
