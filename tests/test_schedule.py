"""The order of batches alone, without an engine: who is in which, and that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.prefix_cache import PrefixCache
from service.schedule import BATCH_ROW_BYTES, MOST_SCORES, Schedule
from service.sequence import Job, Sequence, Waiter
from service.variant import Piece


class Shape:
    """Stands for a Variant that computes nothing."""

    context = 1000

    def __init__(self, cached: bool, rows: int = 1000, pads: bool = False) -> None:
        self.cached, self.row_bytes, self.pads = cached, BATCH_ROW_BYTES // rows, pads

    def tokens_of(self, piece: Piece) -> int:
        return len(piece.ids)


class Reads:
    top_k = 0

    def __init__(self, first: int) -> None:
        self.first = first


def sequence_of(variant: Any, ids: list[int], max_tokens: int | None = None) -> Sequence:
    """One that generates so many tokens; a prompt alone without."""
    reader: Any = None if max_tokens is None else Reads(len(ids) - 1)
    waiter = Waiter.__new__(Waiter)
    waiter.job = Job(variant, ids, 0, reader, max_tokens or 0)
    return Sequence.of(waiter)


def batches(schedule: Schedule) -> Iterator[list[Sequence]]:
    """One after another, until nothing is left."""
    while batch := schedule.next_batch(1):
        over(schedule, batch)
        yield [sequence for sequence, _ in batch]


def over(schedule: Schedule, batch: list[tuple[Sequence, Piece]]) -> None:
    """What the engine does after a batch."""
    for sequence, piece in batch:
        sequence.begun = True
        schedule.computed(sequence, piece)
        if sequence.prefilled and not (sequence.job.reader and sequence.may_go_on):
            schedule.end(sequence)
            continue
        if sequence.prefilled:
            sequence.ids.append(1)
        schedule.add(sequence)


def batches_before(schedule: Schedule, wanted: Sequence) -> int:
    """How many others come before its first one."""
    return next(number for number, batch in enumerate(batches(schedule)) if wanted in batch)


@pytest.mark.parametrize("cached", [True, False])
def test_without_a_pool_those_that_generate_take_turns_with_prompts(cached: bool) -> None:
    variant: Any = Shape(cached)
    schedule = Schedule(variant, None, 512)
    for first in range(8):
        schedule.add(sequence_of(variant, [first] * 100, 400))
    for _, _ in zip(range(5), batches(schedule), strict=False):
        pass
    prompt = sequence_of(variant, [9, 9, 9])
    schedule.add(prompt)
    assert batches_before(schedule, prompt) <= 2


@pytest.mark.parametrize(("rows", "tokens"), [(55, 512), (1000, 50), (1, 1)])
def test_those_that_generate_leave_some_of_a_batch_to_a_prompt(rows: int, tokens: int) -> None:
    """However many they are: for its rows, or for its tokens."""
    variant: Any = Shape(True, rows)
    schedule = Schedule(variant, PrefixCache(1, 20_000, 1), tokens)
    for first in range(60):
        schedule.add(sequence_of(variant, [first] * 2, 100))
    assert any(len(schedule._generating) == 60 for _ in batches(schedule))
    prompts = [sequence_of(variant, [99, number]) for number in range(3)]
    for prompt in prompts:
        schedule.add(prompt)
    batch = schedule.next_batch(1)
    assert batch[0][0].prefilled
    assert next(sequence for sequence, _ in batch if not sequence.prefilled) is prompts[0], "which waits for longest"
    assert rows != 55 or [sequence.prefilled for sequence, _ in batch] == [True] * 52 + [False] * 3


@pytest.mark.parametrize(("slots", "sizes"), [(1000, [10, 0]), (4000, [20, 20])])
def test_lanes_share_what_can_start_and_not_what_waits_for_slots(slots: int, sizes: list[int]) -> None:
    """Of 100 there is room for 10, for whose few tokens one lane reads the weights, or for 40, which are for both."""
    variant: Any = Shape(True)
    schedule = Schedule(variant, PrefixCache(1, slots, 1), 512)
    for first in range(100):
        schedule.add(sequence_of(variant, [first] * 20, 80))
    for step in range(40):
        side_by_side = [schedule.next_batch(lanes) for lanes in (2, 1)]
        assert step < 3 or [len(batch) for batch in side_by_side] == sizes
        for batch in side_by_side:
            over(schedule, batch)


def test_what_waits_for_slots_is_not_looked_up_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    variant: Any = Shape(True)
    cache = PrefixCache(1, 1000, 1)
    schedule = Schedule(variant, cache, 512)
    for first in range(100):
        schedule.add(sequence_of(variant, [first] * 20, 80))
    over(schedule, schedule.next_batch(1))
    looked_up: list[int] = []
    monkeypatch.setattr(cache, "matched", lambda ids: looked_up.append(ids[0]) or 0)
    over(schedule, schedule.next_batch(1))
    assert looked_up == [10], "the first alone, for which the next free slots are"


def test_a_prompt_waits_for_what_it_shares_and_no_longer() -> None:
    variant: Any = Shape(True)
    schedule = Schedule(variant, PrefixCache(1, 4000, 1), 100)
    leads = sequence_of(variant, list(range(900)))
    short, long, longest = (
        sequence_of(variant, [*range(shares), 901, 902, number]) for number, shares in enumerate((16, 250, 899))
    )
    for sequence in (leads, short, long):
        schedule.add(sequence)
    begun: dict[Sequence, int] = {}
    for step in range(12):
        side_by_side = [schedule.next_batch(lanes) for lanes in (2, 1)]
        for batch in side_by_side:
            for sequence, _ in batch:
                begun.setdefault(sequence, step)
            over(schedule, batch)
        if step == 1:
            schedule.add(longest)  # which finds what the first one waited for, and waits for the others
    assert list(begun.values()) == [0, 1, 3, 9]
    assert list(begun) == [leads, short, long, longest]
    assert [sequence.cached for sequence in begun] == [0, 16, 250, 899]


def test_where_attention_pads_a_batch_keeps_to_so_many_scores() -> None:
    """One long prompt beside many short ones would make each as long."""
    for pads, most in ((False, 31), (True, 16)):
        schedule = Schedule(Shape(cached=True, pads=pads), None, 10_000)
        schedule.add(sequence_of(schedule._variant, [1] * 250))
        for n in range(30):
            schedule.add(sequence_of(schedule._variant, [n]))
        assert len(schedule.next_batch(1)) == most
    assert MOST_SCORES // 250**2 == 16
