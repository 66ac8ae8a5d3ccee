"""The engine's queue: what is refused and at which price, what is dropped, given up or late, and what fails whom."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from engine_scenes import (
    CONTEXT,
    LIMIT_S,
    Counting,
    Gated,
    Log,
    hold,
    ids_of,
    job,
    lengths_of,
    play,
    rows_of,
    start,
    until,
)

from service.engine import Engine, Job, Rows
from service.errors import ApiError
from service.prefix_cache import PrefixCache
from service.variant import Piece


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


@pytest.mark.parametrize(
    ("priced", "price"), [({"max_queue_tokens": 100}, "tokens"), ({"max_queue_bytes": 5}, "bytes")]
)
def test_the_queue_is_priced_in_tokens_and_in_memory(priced: dict[str, int], price: str) -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        def jobs(count: int) -> list[Job]:
            if price == "bytes":
                return [job(variant, 1) for _ in range(count)]
            return [Job(variant, [n] * 5, reader=Counting(15, 4), max_tokens=15) for n in range(count)]

        variant.gate.clear()
        waits = await start(engine, jobs(4))
        with pytest.raises(ApiError) as refused:
            await engine.run(jobs(2))
        assert refused.value.status_code == 429
        assert price in refused.value.detail
        with pytest.raises(ApiError) as never:
            await engine.run(jobs(6))
        assert never.value.status_code == 413, "it could never be served"
        variant.gate.set()
        await waits
        await engine.run(jobs(5))

    play(scene, **priced)


def test_what_readers_keep_is_priced() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await start(engine, [Job(variant, [1], reader=Counting(3), max_tokens=3, bytes=600)])
        with pytest.raises(ApiError, match="600 bytes") as refused:
            await engine.run([Job(variant, [2], reader=Counting(3), max_tokens=3, bytes=500)])
        assert refused.value.status_code == 429
        await first
        await engine.run([Job(variant, [2], reader=Counting(3), max_tokens=3, bytes=500)])

    play(scene, slots=CONTEXT, max_queue_bytes=1000)


def test_when_to_come_back_is_computed_from_what_waits_and_how_fast_it_goes() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        waits = await start(engine, [job(variant, 99)])
        engine._token_s = 0.2
        with pytest.raises(ApiError) as refused:
            await engine.run([job(variant, 1)])
        assert refused.value.headers["retry-after"] == "20"
        variant.gate.set()
        await asyncio.gather(first, waits)
        assert engine._token_s < 0.2, "it is measured again"

    play(scene, max_queue=1)


@pytest.mark.parametrize(("wide", "share"), [(True, 1), (False, 4)])
def test_a_batch_on_all_lanes_is_not_one_of_several(wide: bool, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four lanes that take a second each for 10 tokens, a token takes 25 ms; of all as one, 100."""
    seconds = itertools.count()
    monkeypatch.setattr("service.engine.perf_counter", lambda: next(seconds))

    async def scene(engine: Engine, _: Gated, log: Log) -> None:
        await engine.run([job(Gated("b", log, wide=wide), 10)])
        assert engine._token_s == pytest.approx(0.1 * 1 / 10 / share), "the first of a moving average"

    play(scene, lanes=4)


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


def test_a_caller_that_leaves_in_mid_generation_is_counted() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        reader = Counting(50)
        leaves = await start(engine, [Job(variant, [1], reader=reader, max_tokens=50)])
        await until(lambda: len(reader.seen) > 3)
        variant.gate.clear()
        await until(lambda: len(log) > len(reader.seen))  # in a batch
        leaves.cancel()
        await asyncio.wait([leaves])
        variant.gate.set()
        await until(lambda: not engine._unfinished)
        assert engine.metrics._dropped.labels("client_gone")._value.get() == 1
        assert len(reader.seen) < 50

    play(scene, slots=CONTEXT)


def test_what_still_generates_is_given_up_in_words() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        reader = Counting(900)
        task = await start(engine, [Job(variant, [1], reader=reader, max_tokens=900)])
        await until(lambda: len(reader.seen) > 3)
        engine.give_up()
        await asyncio.wait([task])
        error = task.exception()
        assert isinstance(error, ApiError)
        assert error.kind == "unavailable"
        await until(lambda: not engine._unfinished)
        assert len(reader.seen) < 900

    play(scene, slots=CONTEXT)


def test_a_prompt_whose_caller_left_is_finished_for_another() -> None:
    """Which came while its first piece was computed."""

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        leaves = await start(engine, [job(variant, 250, first=5)])
        await until(lambda: bool(log))
        leaves.cancel()
        await asyncio.wait([leaves])
        joins = await start(engine, [job(variant, 250, first=5)])
        variant.gate.set()
        (done,) = await joins
        assert len(ids_of(done.row)) == 250
        assert lengths_of(log) == [[100], [100], [50]]

    play(scene, slots=CONTEXT)


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


def test_the_deadline_is_for_the_first_rows() -> None:
    class Slow(Counting):
        def read(self, rows: Rows) -> int | None:
            threading.Event().wait(0.06)
            return super().read(rows)

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        reader = Slow(20)
        await engine.run([Job(variant, [1], reader=reader, max_tokens=99)])
        assert len(reader.seen) == 21

    play(scene, slots=CONTEXT, timeout_s=1.0)  # of 1.2; a busy machine has a first row by then


def test_a_request_whose_first_choices_go_on_is_not_late() -> None:
    """The later ones wait for slots that these hold."""

    class Slow(Counting):
        def read(self, rows: Rows) -> int | None:
            threading.Event().wait(0.003)
            return super().read(rows)

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        readers = [Slow(200) for _ in range(3)]
        await engine.run([Job(variant, [n], reader=reader, max_tokens=900) for n, reader in enumerate(readers)])
        assert [len(reader.seen) for reader in readers] == [201] * 3

    play(scene, slots=CONTEXT, timeout_s=0.5)


def test_what_one_choice_raises_ends_the_request_at_once() -> None:
    """Also before another one had a row, or a later row of its own."""

    class Fails(Counting):
        def read(self, rows: Rows) -> int | None:
            if len(self.seen) == 5:
                raise ValueError("cannot be read")
            return super().read(rows)

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        readers = [Counting(800), Fails(800), Counting(800)]
        with pytest.raises(ValueError, match="cannot be read"):
            await engine.run([Job(variant, [n], reader=reader, max_tokens=450) for n, reader in enumerate(readers)])
        assert len(readers[0].seen) < 20
        assert len(readers[2].seen) < 20  # it may take the slots that the failed one gave back, before all are dropped

    play(scene, slots=CONTEXT)


def test_a_batch_that_fails_fails_its_requests_only() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        broken_one, cache = Gated("broken", [], cached=True), PrefixCache(1, CONTEXT, 1)
        engine._caches = {broken_one: cache, variant: PrefixCache(1, CONTEXT, 1)}
        broken_one.compute = None  # type: ignore[method-assign, assignment]
        shared = list(range(50))
        broken = await start(engine, [Job(broken_one, [*shared, n]) for n in range(3)] + [job(variant, 1)])
        fine = await start(engine, [job(variant, 1)])
        assert len(await fine) == 1
        with pytest.raises(TypeError, match="not callable"):
            await broken
        assert engine.serving
        await until(lambda: not engine._unfinished)
        assert cache.used == 0, "it gave its slots back, and those that waited for it too"

    play(scene)


@pytest.mark.parametrize("step", ["next_batch", "computed"])
def test_a_defect_of_ours_fails_all_that_wait(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and the service says that it does not serve any more."""

    def breaks(*_: object) -> None:
        raise RuntimeError("a defect")

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        seen: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
        first = await hold(engine, variant, log)
        waits = await start(engine, [job(variant, 250), Job(variant, [1], reader=Counting(5), max_tokens=5)])
        same = await start(engine, [job(variant, 3, first=7)])
        also = await start(engine, [job(variant, 3, first=7)])
        monkeypatch.setattr(engine._schedules[variant], step, breaks)
        variant.gate.set()
        found = await asyncio.wait_for(asyncio.gather(first, waits, same, also, return_exceptions=True), LIMIT_S / 4)
        assert isinstance(found[0], RuntimeError) == (step == "computed"), "its batch was over before the next one"
        assert [str(error) for error in found[1:]] == ["a defect"] * 3
        assert [str(error) for error in seen] == ["a defect"]
        assert not engine.serving
        assert engine.waiting == 0
        with pytest.raises(ApiError) as refused:
            await engine.run([job(variant, 1)])
        assert refused.value.status_code == 503
        engine._caches.clear()  # type: ignore[attr-defined]  # whose slots are lost

    play(scene, slots=CONTEXT)


def test_a_variant_that_gives_too_few_rows_fails_its_requests_only() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        class Short(Gated):
            def compute(self, pieces: Sequence[Piece], *_: Any) -> list[Rows]:
                return [rows_of([1], 0) for _ in pieces]

        short = Short("short", log)
        with pytest.raises(ValueError, match="'short' gives 0 rows where 1 are asked"):
            await engine.run([job(short, 1), job(short, 1)])
        assert len(await engine.run([job(variant, 2)])) == 1
        assert engine.serving

    play(scene)


def test_leaving_finishes_what_is_queued_and_takes_no_more() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        reader = Counting(5)
        queued = await start(engine, [job(variant, 4), Job(variant, [1], reader=reader, max_tokens=5)])
        leaving = asyncio.create_task(engine.__aexit__())
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as stopping:
            await engine.run([job(variant, 1)])
        assert stopping.value.status_code == 503
        variant.gate.set()
        assert len(ids_of((await queued)[0].row)) == 4
        assert len(reader.seen) == 6
        await first
        await leaving

    play(scene)
