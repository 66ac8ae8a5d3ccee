"""The scheduler alone: what is computed together, in which order, what is refused, and what is dropped."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from service.engine import Done, Engine, Job, Row, Rows
from service.errors import ApiError
from service.prefix_cache import PrefixCache
from service.schedule import BATCH_ROW_BYTES
from service.variant import Piece

LIMIT_S = 10  # a hang fails instead
CONTEXT = 1000
Log = list[tuple[str, list[list[int]], int]]


class Gated:
    """Stands for a Variant: notes each batch, computes it once the gate is open.

    A row's logits are the ids up to its token, the earlier ones as the pool has them. `log` holds what is computed.
    """

    context = CONTEXT
    pads = False

    def __init__(self, name: str, log: Log, wide: bool = False, cached: bool = False, row_bytes: int = 1) -> None:
        self.name, self.cached, self.row_bytes = name, cached, row_bytes
        self.gate = threading.Event()
        self.gate.set()
        self.ran_wide: list[bool] = []
        self._wide, self._log = wide, log

    def faster_wide(self, tokens: int) -> bool:
        return self._wide

    def tokens_of(self, piece: Piece) -> int:
        return len(piece.ids)

    def compute(self, pieces: Sequence[Piece], top_k: int, pool: np.ndarray, wide: bool) -> list[Rows]:
        self._log.append((self.name, [list(piece.ids) for piece in pieces], top_k))
        self.ran_wide.append(wide)
        assert self.gate.wait(LIMIT_S)
        found = []
        for piece in pieces:
            past = pool[0, piece.past, 0].astype(int).tolist() if piece.past.size else []
            if piece.slots.size:
                pool[0, piece.slots, 0] = piece.ids
            found.append(rows_of([*past, *piece.ids], piece.rows))
        return found


def rows_of(ids: list[int], rows: int) -> Rows:
    """As many of the last rows: -1 after a row's ids."""
    logits = np.full((rows, CONTEXT), -1.0, np.float32)
    for row, end in zip(logits, range(len(ids) - rows + 1, len(ids) + 1), strict=True):
        row[:end] = ids[:end]
    two = np.zeros((rows, 2), np.float32)
    return Rows(logits, logits, logits, np.zeros((rows, 1), np.int64), two, two)


def ids_of(row: Row | None) -> list[int]:
    assert row is not None
    return [int(id_) for id_ in row.logits if id_ >= 0]


class Counting:
    """A reader that gives 500, 501, ..., up to `most` of them, and keeps each row's ids."""

    top_k = 1

    def __init__(self, most: int, first: int = 0, tokens: int = 1) -> None:
        self.first, self._left, self._before = first, most, tokens - first
        self.seen: list[list[int]] = []

    def read(self, rows: Rows) -> int | None:
        self.seen += [[int(id_) for id_ in row if id_ >= 0] for row in rows.logits]
        self._left -= len(self.seen) >= self._before
        return 500 + len(self.seen) - self._before if self._left >= 0 else None


def play(scene: Callable[[Engine, Gated, Log], Awaitable[None]], slots: int = 0, **options: Any) -> None:
    """Run `scene` with an engine of `options` and a variant, which has a cache of so many slots."""
    log: Log = []
    variant = Gated("a", log, cached=bool(slots))

    async def with_engine() -> None:
        caches: Any = {variant: PrefixCache(1, slots, 1)} if slots else {}
        given = {"max_queue": 1000, "max_batch_tokens": 100, "timeout_s": LIMIT_S, "caches": caches}
        async with Engine(**{**given, **options}) as engine:
            await scene(engine, variant, log)
        for cache in caches.values():
            assert cache._held == 0
            assert cache.used == cache._stored

    asyncio.run(asyncio.wait_for(with_engine(), 2 * LIMIT_S))


async def start(engine: Engine, jobs: list[Job]) -> asyncio.Task[list[Done]]:
    """A running request, its jobs admitted."""
    task = asyncio.create_task(engine.run(jobs))
    await asyncio.sleep(0)
    return task


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def hold(engine: Engine, variant: Gated, log: Log) -> asyncio.Task[list[Done]]:
    """A request that the engine is computing, so that others have to wait until variant.gate opens."""
    variant.gate.clear()
    before = len(log)
    task = await start(engine, [job(variant, 1)])
    await until(lambda: len(log) > before)
    return task


_numbers = itertools.count(1000)


def job(variant: Any, length: int, top_k: int = 1, first: int | None = None) -> Job:
    """A prompt of its own; the same again where `first` is."""
    return Job(variant, [next(_numbers) if first is None else first, *range(1, length)], top_k)


def lengths_of(log: Log) -> list[list[int]]:
    return [[len(ids) for ids in batch] for _, batch, _ in log]


def test_waiting_requests_are_computed_together_and_keep_their_order() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        others = [await start(engine, [job(variant, length, top_k=length)]) for length in (3, 1, 2)]
        variant.gate.set()
        done = [await task for task in (first, *others)]
        assert [len(ids_of(each.row)) for (each,) in done] == [1, 3, 1, 2]
        assert len(log) == 2
        assert log[1][2] == 3, "top_k of a batch is its largest"

    play(scene)


def test_a_prompt_that_does_not_fit_goes_on_in_the_next_batch() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        lengths = [10, 75, 50, 230, 7]
        request = await start(engine, [job(variant, length) for length in lengths])
        variant.gate.set()
        await first
        assert [len(ids_of(done.row)) for done in await request] == lengths
        assert lengths_of(log)[1:] == [[10, 75, 15], [35, 65], [100], [65, 7]]

    play(scene, slots=CONTEXT)


def test_without_a_cache_a_batch_keeps_to_the_budget_of_padded_tokens() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        lengths = [10, 90, 10, 50, 10, 45, 120, 10]
        request = await start(engine, [job(variant, length) for length in lengths])
        variant.gate.set()
        await first
        assert [len(ids_of(done.row)) for done in await request] == lengths
        assert lengths_of(log)[1:] == [[10, 10, 10, 10], [90], [50, 45], [120]], "one too long runs alone"

    play(scene, max_batch_tokens=100)


def test_without_a_cache_a_batch_has_little_padding() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        request = await start(engine, [job(variant, length) for length in (400, 1, 390, 100, 250, 2, 101)])
        variant.gate.set()
        await asyncio.gather(first, request)
        assert lengths_of(log)[1:] == [[400, 390], [1, 2], [100, 101], [250]]

    play(scene, max_batch_tokens=10_000)


def test_a_batch_has_at_most_so_many_bytes_of_rows() -> None:
    async def scene(engine: Engine, _: Gated, log: Log) -> None:
        variant = Gated("long", log, row_bytes=BATCH_ROW_BYTES // 4)
        await engine.run([job(variant, 1) for _ in range(9)])
        assert [len(batch) for _, batch, _ in log] == [4, 4, 1]

    play(scene)


def test_a_reader_gets_every_row_in_order_though_they_are_too_many_for_a_batch() -> None:
    async def scene(engine: Engine, _: Gated, log: Log) -> None:
        variant = Gated("long", log, cached=True, row_bytes=BATCH_ROW_BYTES // 4)
        engine._caches = {variant: PrefixCache(1, CONTEXT, 1)}
        reader, ids = Counting(3, first=2, tokens=13), list(range(40, 53))
        await engine.run([Job(variant, ids, reader=reader, max_tokens=9)])
        assert reader.seen == [[*ids, 500, 501, 502][:end] for end in range(3, 17)]
        assert lengths_of(log) == [[6], [4], [3], [1], [1], [1]]

    play(scene)


def test_generating_sequences_come_first_and_new_prompts_join_them() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        readers = [Counting(4), Counting(2)]
        first = await hold(engine, variant, log)
        both = await start(engine, [Job(variant, [n], reader=r, max_tokens=9) for n, r in enumerate(readers)])
        joins = await start(engine, [job(variant, 250)])
        variant.gate.set()
        await asyncio.gather(first, both, joins)
        assert lengths_of(log)[1:] == [[1, 1, 98], [1, 1, 98], [1, 1, 54], [1], [1]]
        assert readers[0].seen[-1] == [0, 500, 501, 502, 503]
        assert readers[1].seen[-1] == [1, 500, 501]

    play(scene, slots=CONTEXT)


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


def test_generation_does_not_keep_other_variants_waiting() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        other = Gated("b", log)
        long = await start(engine, [Job(variant, [1], reader=Counting(50), max_tokens=50)])
        for _ in range(5):
            before = len(log)
            await engine.run([job(other, 3)])
            assert [name for name, _, _ in log[before:]].index("b") <= 2
        await long

    play(scene, slots=CONTEXT)


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
            threading.Event().wait(0.02)
            return super().read(rows)

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        reader = Slow(20)
        await engine.run([Job(variant, [1], reader=reader, max_tokens=99)])
        assert len(reader.seen) == 21

    play(scene, slots=CONTEXT, timeout_s=0.2)


def test_a_request_whose_first_choices_go_on_is_not_late() -> None:
    """The later ones wait for slots that these hold."""

    class Slow(Counting):
        def read(self, rows: Rows) -> int | None:
            threading.Event().wait(0.001)
            return super().read(rows)

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        readers = [Slow(200) for _ in range(3)]
        await engine.run([Job(variant, [n], reader=reader, max_tokens=900) for n, reader in enumerate(readers)])
        assert [len(reader.seen) for reader in readers] == [201] * 3

    play(scene, slots=CONTEXT, timeout_s=0.1)


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


def test_one_prompt_of_many_callers_is_computed_once() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        first = await hold(engine, variant, log)
        same = [await start(engine, [job(variant, 3, top_k=k, first=5)]) for k in (1, 4, 2)]
        other = await start(engine, [job(Gated("b", log), 3, first=5)])
        same[0].cancel()
        variant.gate.set()
        rows = [ids_of((await task)[0].row) for task in (*same[1:], other)]
        await first
        assert rows == [[5, 1, 2]] * 3
        assert log[1:] == [("a", [[5, 1, 2]], 4), ("b", [[5, 1, 2]], 1)]

    play(scene)


def test_a_prompt_that_is_being_computed_is_not_computed_again() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        first = await start(engine, [job(variant, 2, top_k=3, first=5)])
        await until(lambda: bool(log))
        first.cancel()
        await asyncio.wait([first])
        joins = await start(engine, [job(variant, 2, top_k=3, first=5)])
        wants_more = await start(engine, [job(variant, 2, top_k=4, first=5)])
        variant.gate.set()
        done = [(await task)[0] for task in (joins, wants_more)]
        assert [ids_of(each.row) for each in done] == [[5, 1]] * 2
        assert done[0].queue_s == 0
        assert done[0].infer_s >= 0
        assert [top_k for _, _, top_k in log] == [3, 4]

    play(scene)


def test_what_begins_like_one_that_is_computed_waits_for_it() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        preamble = list(range(50))
        variant.gate.clear()
        first = await start(engine, [Job(variant, [*preamble, 60, 61])])
        await until(lambda: bool(log))
        also = await start(engine, [Job(variant, [*preamble, n]) for n in range(60, 64)])
        short = await start(engine, [Job(variant, [*preamble[:15], 99])])
        reads_all = await start(engine, [Job(variant, [*preamble, 70], reader=Counting(0, 0, 51))])
        assert engine.waiting == 6
        variant.gate.set()
        done = list(itertools.chain(*await asyncio.gather(first, also, short, reads_all)))
        assert [ids_of(each.row)[-1] for each in done[:-1]] == [61, *range(60, 64), 99]
        # Whose rows are wanted all along has to compute it all; 15 shared tokens are not worth waiting for.
        assert lengths_of(log)[0] == [52]
        assert sorted(itertools.chain(*lengths_of(log)[1:])) == [1, 1, 1, 1, 1, 51]
        assert [each.cached_tokens for each in done] == [0, 50, 50, 50, 50, 15, 0]

    play(scene, slots=CONTEXT, max_batch_tokens=1000)


def test_those_that_wait_for_a_caller_that_leaves_are_computed_all_the_same() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        preamble = list(range(150))
        variant.gate.clear()
        leaves = await start(engine, [Job(variant, [*preamble, 60, 61])])
        await until(lambda: bool(log))
        stay = await start(engine, [Job(variant, [*preamble, n]) for n in range(60, 64)])
        leaves.cancel()
        await asyncio.wait([leaves])
        also_leaves = await start(engine, [Job(variant, [*preamble, 70])])
        also_leaves.cancel()
        await asyncio.wait([also_leaves])
        variant.gate.set()
        assert [ids_of(each.row)[-1] for each in await stay] == list(range(60, 64))
        assert sum(itertools.chain(*lengths_of(log))) == 154, "what was computed of the one that left counts"

    play(scene, slots=CONTEXT)
    play(scene, slots=CONTEXT, lanes=2)


def test_one_whose_rows_are_all_wanted_waits_for_nobody() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        leads = await start(engine, [Job(variant, list(range(50)))])
        await until(lambda: bool(log))
        follows = await start(engine, [Job(variant, list(range(51)))])
        reads_all = await start(engine, [Job(variant, list(range(52)), reader=Counting(0, 0, 52))])
        await until(lambda: len(log) == 2)
        assert lengths_of(log) == [[50], [52]]
        assert engine.waiting == 1
        variant.gate.set()
        await asyncio.gather(leads, follows, reads_all)

    play(scene, slots=CONTEXT, lanes=2)


def test_a_full_cache_lets_prompts_wait_or_go_without() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        generating = await start(engine, [Job(variant, [1], reader=Counting(600), max_tokens=900)])
        await until(lambda: bool(log))
        reader = Counting(60, 49, 50)
        waits = await start(engine, [Job(variant, [2] * 50, reader=reader, max_tokens=99)])
        small = await start(engine, [Job(variant, [3], reader=Counting(5), max_tokens=5)])
        (done,) = await engine.run([Job(variant, [4] * 60)])
        assert ids_of(done.row) == [4] * 60
        assert not generating.done()
        assert not reader.seen
        await asyncio.gather(waits, small, generating)
        assert len(reader.seen) == 61
        begun = [ids[0] for _, batch, _ in log for ids in batch]
        assert begun.index(2) < begun.index(3), "though there would have been room for the small one"

    play(scene, slots=CONTEXT)


def test_lanes_run_side_by_side_and_no_more_than_there_are() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant.gate.clear()
        others = [Gated(name, log) for name in "bc"]
        for other in others:
            other.gate.clear()
        running = [await start(engine, [job(each, 1)]) for each in (variant, *others)]
        await until(lambda: len(log) == 2)
        await asyncio.sleep(0.02)
        assert sorted(name for name, _, _ in log) == ["a", "b"]
        assert engine.waiting == 1
        others[0].gate.set()
        await until(lambda: len(log) == 3)
        for each in (variant, *others):
            each.gate.set()
        await asyncio.gather(*running)

    play(scene, lanes=2)


def test_what_is_ready_is_shared_out_among_the_free_lanes() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        await engine.run([job(variant, 5) for _ in range(7)])
        assert sorted(map(len, lengths_of(log))) == [3, 4]
        log.clear()
        other = Gated("b", log)
        await asyncio.gather(*(engine.run([job(each, 5) for _ in range(3)]) for each in (variant, other)))
        assert list(map(len, lengths_of(log))) == [3, 3], "each lane has a variant's"

    play(scene, lanes=2)


def test_a_batch_that_is_alone_takes_all_lanes_where_that_is_faster() -> None:
    async def scene(engine: Engine, _: Gated, log: Log) -> None:
        variant, other = Gated("wide", log, wide=True), Gated("narrow", log)
        await engine.run([job(variant, 1)])
        assert variant.ran_wide == [True]
        variant.gate.clear()
        alone = await start(engine, [job(variant, 1)])
        await until(lambda: len(log) == 2)
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
