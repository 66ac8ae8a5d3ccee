"""The scheduler alone: what is computed together, in which order, what is computed once, and in which lane."""

from __future__ import annotations

import asyncio
import itertools
import time
from threading import current_thread

import pytest
from engine_scenes import CONTEXT, Counting, Gated, Log, hold, ids_of, job, lengths_of, play, start, until

from service.engine import Engine, Job
from service.prefix_cache import PrefixCache
from service.schedule import BATCH_ROW_BYTES


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
            # After the step that runs, and at most two that the lane goes on with before the event loop looks again.
            assert [name for name, _, _ in log[before:]].index("b") <= 3
        await long

    play(scene, slots=CONTEXT)


def test_a_lane_goes_on_with_what_generates_and_is_never_far_ahead_of_the_event_loop() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        readers = [Counting(50), Counting(40)]
        both = await start(engine, [Job(variant, [n], reader=r, max_tokens=50) for n, r in enumerate(readers)])
        await until(lambda: len(log) > 2)
        before = len(log)
        time.sleep(0.1)  # the event loop is busy
        assert len(log) - before <= 3
        await both
        assert [reader.seen[-1] for reader in readers] == [[0, *range(500, 550)], [1, *range(500, 540)]]
        assert len(log) == 51
        assert engine._batches < 40, "not a batch of its own for each token"

    play(scene, slots=CONTEXT)


def test_a_lane_stops_soon_after_the_last_caller_has_left() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        reader = Counting(900)
        long = await start(engine, [Job(variant, [1], reader=reader, max_tokens=900)])
        await until(lambda: len(log) > 2)
        long.cancel()
        await asyncio.wait([long])
        before = len(log)
        await until(lambda: engine.idle)
        assert len(log) - before <= 3

    play(scene, slots=CONTEXT)


def test_a_lane_that_goes_on_alone_gives_way_to_all_of_them_where_that_is_faster() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        other = Gated("b", log)
        other.gate.clear()
        held = await start(engine, [job(other, 3)])
        await until(lambda: len(log) == 1)
        variant._wide = True
        reader = Counting(200)
        long = await start(engine, [Job(variant, [1], reader=reader, max_tokens=200)])
        await until(lambda: len(log) > 5)
        other.gate.set()
        await asyncio.gather(held, long)
        narrow = variant.ran_wide.index(True)
        assert variant.ran_wide == [False] * narrow + [True] * (201 - narrow)
        assert len(reader.seen) == 201

    play(scene, slots=CONTEXT, lanes=2)


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


def test_what_waits_for_slots_does_not_keep_a_batch_from_all_lanes() -> None:
    """It cannot start before another one ends, so nothing could run beside that one's batches."""

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        variant._wide = True
        readers = [Counting(20), Counting(20)]
        await engine.run([Job(variant, [n], reader=reader, max_tokens=700) for n, reader in enumerate(readers)])
        assert [len(reader.seen) for reader in readers] == [21, 21]
        assert {len(batch) for _, batch, _ in log} == {1}, "there is room for one of them"
        assert variant.ran_wide == [True] * 42

    play(scene, slots=CONTEXT, lanes=2)


def test_a_variant_that_waits_for_slots_has_no_lane_kept_free() -> None:
    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        other = Gated("b", log)
        reader = Counting(2)
        generating = await start(engine, [Job(variant, [1], reader=reader, max_tokens=700)])
        variant.gate.clear()
        await until(lambda: len(log) >= 1)
        waits = await start(engine, [Job(variant, [2], reader=Counting(2), max_tokens=700)])
        log.clear()
        done = await engine.run([job(other, 10) for _ in range(6)])
        assert len(done) == 6
        assert sorted(map(len, lengths_of(log))) == [3, 3], "both lanes that nobody else can use"
        variant.gate.set()
        await asyncio.gather(generating, waits)

    play(scene, slots=CONTEXT, lanes=3)


def test_the_cache_has_its_memory_ahead_of_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start on, and by another thread than those that wait for it."""
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr("service.prefix_cache.HUGE_PAGE", 4 * 100)  # the floats of 100 slots
    monkeypatch.setattr(PrefixCache, "populate", lambda _, slots: asked.append((slots.start, current_thread().name)))

    async def scene(engine: Engine, variant: Gated, log: Log) -> None:
        await until(lambda: len(asked) == 1)
        for first in range(0, 500, 25):
            await engine.run([Job(variant, list(range(first, first + 25)))])
        await until(lambda: len(asked) == 6)
        assert [start for start, _ in asked] == list(range(0, 600, 100))
        assert {name for _, name in asked} == {"memory_0"}

    play(scene, slots=1000)
