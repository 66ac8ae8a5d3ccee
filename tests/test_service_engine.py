"""The batcher alone: what is computed together, in which order, and what is dropped."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.engine import MAX_ROWS, Done, Engine, Job
from service.errors import ApiError

LIMIT_S = 10  # a hang fails instead


class Gated:
    """Stands for a Variant: notes each batch, computes it once the gate is open. Its rows are the ids."""

    def __init__(self, name: str, log: list[tuple[str, list[list[int]], int]], wide: bool = False) -> None:
        self.name = name
        self.gate = threading.Event()
        self.gate.set()
        self.wide = wide
        self.ran_wide: list[bool] = []
        self._log = log

    def run(self, prompts: list[tuple[int, ...]], top_k: int, wide: bool) -> list[Any]:
        self._log.append((self.name, list(map(list, prompts)), top_k))
        self.ran_wide.append(wide)
        assert self.gate.wait(LIMIT_S)
        return list(prompts)


Log = list[tuple[str, list[list[int]], int]]


def play(scene: Callable[[Engine, Gated, Log], Awaitable[None]], **options: Any) -> None:
    """Run `scene` with an engine of `options` and a variant."""
    log: Log = []

    async def with_engine() -> None:
        engine = Engine(**{"max_queue": 1000, "max_batch_tokens": 100, "timeout_s": LIMIT_S, **options})
        async with engine:
            await scene(engine, Gated("a", log), log)

    asyncio.run(asyncio.wait_for(with_engine(), 2 * LIMIT_S))


async def start(engine: Engine, jobs: list[Job]) -> asyncio.Task[list[Done]]:
    """A running request, its jobs admitted."""
    task = asyncio.create_task(engine.run(jobs))
    await asyncio.sleep(0)
    return task


async def hold(engine: Engine, variant: Gated, log: Log) -> asyncio.Task[list[Done]]:
    """A request that the engine is computing, so that others have to wait until variant.gate opens."""
    variant.gate.clear()
    before = len(log)
    task = await start(engine, [job(variant, 1)])
    while len(log) == before:
        await asyncio.sleep(0.001)
    return task


_numbers = itertools.count(1000)


def job(variant: Any, length: int, top_k: int = 1, first: int | None = None) -> Job:
    """A prompt of its own; the same again where `first` is."""
    return Job(variant, [next(_numbers) if first is None else first, *range(1, length)], top_k)


def test_waiting_requests_are_computed_together_and_keep_their_order() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        others = [await start(engine, [job(variant, length, top_k=length)]) for length in (3, 1, 2)]
        variant.gate.set()
        done = [await task for task in (first, *others)]
        assert [len(d[0].row) for d in done] == [1, 3, 1, 2]
        assert len(log) == 2
        assert log[1][2] == 3, "top_k of a batch is its largest"

    play(scene)


def test_a_batch_keeps_to_the_budget_of_padded_tokens() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        lengths = [10, 90, 10, 50, 10, 45, 120, 10]
        request = await start(engine, [job(variant, length) for length in lengths])
        variant.gate.set()
        await first
        assert [len(done.row) for done in await request] == lengths
        batches = [[len(prompt) for prompt in prompts] for _, prompts, _ in log[1:]]
        assert batches == [[10, 10, 10, 10], [90], [50, 45], [120]], "one too long for the budget runs alone"

    play(scene, max_batch_tokens=100)


def test_a_batch_has_little_padding() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        request = await start(engine, [job(variant, length) for length in (400, 1, 390, 100, 250, 2, 101)])
        variant.gate.set()
        await asyncio.gather(first, request)
        batches = [[len(prompt) for prompt in prompts] for _, prompts, _ in log[1:]]
        assert batches == [[400, 390], [1, 2], [100, 101], [250]]

    play(scene, max_batch_tokens=10_000)


def test_a_batch_has_at_most_max_rows() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        await engine.run([job(variant, 1) for _ in range(2 * MAX_ROWS + 1)])
        assert [len(prompts) for _, prompts, _ in log] == [MAX_ROWS, MAX_ROWS, 1]

    play(scene)


def test_variants_take_turns() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        other = Gated("b", log)
        many = await start(engine, [job(variant, 50) for _ in range(6)])
        few = await start(engine, [job(other, 50)])
        variant.gate.set()
        await asyncio.gather(first, many, few)
        assert [name for name, _, _ in log] == ["a", "a", "b", "a", "a"]

    play(scene, max_batch_tokens=100)


def test_a_full_queue_refuses_a_request_as_a_whole() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        waits = await start(engine, [job(variant, 1) for _ in range(3)])
        with pytest.raises(ApiError) as refused:
            await engine.run([job(variant, 1), job(variant, 1)])
        assert refused.value.status_code == 429
        assert 1 <= int(refused.value.headers["retry-after"]) <= 60
        assert engine.waiting == 3
        one_more = await start(engine, [job(variant, 1)])
        variant.gate.set()
        await asyncio.gather(first, waits, one_more)

    play(scene, max_queue=4)


def test_a_caller_that_left_is_dropped_from_the_queue() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        leaves = await start(engine, [job(variant, 5), job(variant, 5)])
        stays = await start(engine, [job(variant, 2, first=7)])
        leaves.cancel()
        await asyncio.wait([leaves])
        assert engine.waiting == 1
        variant.gate.set()
        await asyncio.gather(first, stays)
        assert [prompts for _, prompts, _ in log[1:]] == [[[7, 1]]]

    play(scene)


def test_a_caller_may_leave_while_it_is_computed() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        first.cancel()
        await asyncio.wait([first])
        variant.gate.set()
        assert len(await engine.run([job(variant, 2)])) == 1

    play(scene)


def test_a_request_that_waits_too_long_is_answered_408() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        with pytest.raises(ApiError) as late:
            await engine.run([job(variant, 1)])
        assert late.value.status_code == 408
        assert engine.waiting == 0
        variant.gate.set()
        await asyncio.wait([first])
        assert isinstance(first.exception(), ApiError)

    play(scene, timeout_s=0.05)


def test_a_batch_that_fails_fails_its_requests_only() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        class Broken:
            name, wide = "broken", False

            def run(self, *_: object) -> list[Any]:
                raise RuntimeError("out of memory")

        broken = await start(engine, [job(Broken(), 1), job(variant, 1)])
        fine = await start(engine, [job(variant, 1)])
        assert len(await fine) == 1
        with pytest.raises(RuntimeError, match="out of memory"):
            await broken
        assert engine.serving

    play(scene)


def test_a_variant_that_gives_too_few_rows_fails_its_requests_only() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        class Short:
            name, wide = "short", False

            def run(self, prompts: list[list[int]], top_k: int, wide: bool) -> list[Any]:
                return prompts[1:]

        with pytest.raises(ValueError, match="'short' gives 0 rows for 1 prompts"):
            await engine.run([job(Short(), 1), job(Short(), 1)])
        assert len(await engine.run([job(variant, 2)])) == 1
        assert engine.serving

    play(scene)


def test_one_prompt_of_many_callers_is_computed_once() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        same = [await start(engine, [job(variant, 3, top_k=k, first=5)]) for k in (1, 4, 2)]
        other = await start(engine, [job(Gated("b", log), 3, first=5)])
        same[0].cancel()
        variant.gate.set()
        rows = [(await task)[0].row for task in (*same[1:], other)]
        await first
        assert rows == [(5, 1, 2)] * 3
        assert log[1:] == [("a", [[5, 1, 2]], 4), ("b", [[5, 1, 2]], 1)]

    play(scene)


def test_a_prompt_that_is_being_computed_is_not_computed_again() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        first = await start(engine, [job(variant, 2, top_k=3, first=5)])
        while not log:
            await asyncio.sleep(0.001)
        joins = await start(engine, [job(variant, 2, top_k=3, first=5)])
        wants_more = await start(engine, [job(variant, 2, top_k=4, first=5)])
        first.cancel()
        variant.gate.set()
        done = [(await task)[0] for task in (joins, wants_more)]
        assert [each.row for each in done] == [(5, 1)] * 2
        assert done[0].queue_s == 0
        assert done[0].infer_s >= 0
        assert [top_k for _, _, top_k in log] == [3, 4]

    play(scene)


def test_lanes_run_side_by_side_and_no_more_than_there_are() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        others = [Gated(name, log) for name in "bc"]
        for other in others:
            other.gate.clear()
        running = [await start(engine, [job(each, 1)]) for each in (variant, *others)]
        while len(log) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert [name for name, _, _ in log] == ["a", "b"]
        assert engine.waiting == 1
        others[0].gate.set()
        while len(log) < 3:
            await asyncio.sleep(0.001)
        for each in (variant, *others):
            each.gate.set()
        await asyncio.gather(*running)

    play(scene, lanes=2)


def test_a_batch_that_is_alone_takes_all_lanes_where_that_is_faster() -> None:
    async def scene(engine: Engine, _: Gated, log: Log) -> None:
        variant, other = Gated("wide", log, wide=True), Gated("narrow", log)
        await engine.run([job(variant, 1)])
        assert variant.ran_wide == [True]
        variant.gate.clear()
        alone = await start(engine, [job(variant, 1)])
        while len(log) < 2:
            await asyncio.sleep(0.001)
        after = [await start(engine, [job(each, 1)]) for each in (variant, other)]
        await asyncio.sleep(0.02)
        assert len(log) == 2, "nothing runs beside a batch on all lanes"
        variant.gate.set()
        await asyncio.gather(alone, *after)
        assert variant.ran_wide == [True, True, False], "two batches go side by side"
        assert other.ran_wide == [False]

    play(scene, lanes=2)


def test_leaving_finishes_what_is_queued_and_takes_no_more() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        queued = await start(engine, [job(variant, 4)])
        leaving = asyncio.create_task(engine.__aexit__())
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as stopping:
            await engine.run([job(variant, 1)])
        assert stopping.value.status_code == 503
        variant.gate.set()
        assert len((await queued)[0].row) == 4
        await first
        await leaving

    play(scene)
