"""The batcher alone: what is computed together, in which order, and what is dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.engine import MAX_ROWS, Done, Engine, Job
from service.errors import ApiError

LIMIT_S = 10  # a hang fails instead


class Gated:
    """Stands for a Variant: notes each batch, computes it once the gate is open. Its rows are the ids."""

    def __init__(self, name: str, log: list[tuple[str, list[list[int]], int]]) -> None:
        self.name = name
        self.gate = threading.Event()
        self.gate.set()
        self._log = log

    def run(self, prompts: list[list[int]], top_k: int) -> list[Any]:
        self._log.append((self.name, prompts, top_k))
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


def job(variant: Any, length: int, top_k: int = 1) -> Job:
    return Job(variant, list(range(length)), top_k)


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
        stays = await start(engine, [job(variant, 2)])
        leaves.cancel()
        await asyncio.wait([leaves])
        assert engine.waiting == 1
        variant.gate.set()
        await asyncio.gather(first, stays)
        assert [prompts for _, prompts, _ in log] == [[[0]], [[0, 1]]]

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
            def run(self, prompts: list[list[int]], top_k: int) -> list[Any]:
                return prompts[1:]

        with pytest.raises(ValueError, match="shorter"):
            await engine.run([job(Short(), 1), job(Short(), 1)])
        assert len(await engine.run([job(variant, 2)])) == 1
        assert engine.serving

    play(scene)


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
