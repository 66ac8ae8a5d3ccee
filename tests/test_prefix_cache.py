"""The cache's tree and its slots, alone: by hand, and against a model that keeps every prefix by itself."""

from __future__ import annotations

import mmap
import resource
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import memory
from service.memory import HUGE_PAGE, populate
from service.prefix_cache import Prefix, PrefixCache, prefix_caches

Ids = tuple[int, ...]


def keep(cache: PrefixCache, *ids: int) -> Prefix:
    """A prompt, computed: its prefix found, the rest put into slots."""
    held = cache.hold(ids)
    known = held.slots.size
    slots = cache.take(len(ids) - known)
    assert slots is not None
    return cache.keep(held, ids[known:], slots)


def test_it_finds_the_longest_prefix() -> None:
    cache = PrefixCache(1, 20, 1)
    for ids in ((1, 2, 3, 4), (1, 2, 5), (6,)):
        cache.release(keep(cache, *ids))
    found = {(1, 2, 3, 4, 9): 4, (1, 2, 3): 3, (1, 2, 5): 3, (1, 2, 9): 2, (1,): 1, (6, 1): 1, (9,): 0, (): 0}
    for ids, length in found.items():
        assert cache.matched(ids) == length, ids
        prefix = cache.hold(ids)
        assert prefix.slots.size == length
        cache.release(prefix)
    assert cache.used == 6, "1 and 2 are there once"


def test_a_text_that_grows_stays_one_run() -> None:
    cache = PrefixCache(1, 20, 1)
    for length in range(1, 20):
        cache.release(keep(cache, *range(length)))
    (run,) = cache._root.children.values()
    assert run.ids == list(range(19))
    assert not run.children


def test_a_run_that_somebody_holds_does_not_grow() -> None:
    """What comes after it could not be evicted as long as it is held."""
    cache = PrefixCache(1, 4, 1)
    held = keep(cache, 1, 2)
    cache.release(keep(cache, 1, 2, 3, 4))
    assert cache.take(2) is not None
    assert cache.take(1) is None
    cache.release(held)


def test_the_least_recently_used_end_goes_first() -> None:
    cache = PrefixCache(1, 9, 1)
    for ids in ((1, 2, 3), (1, 2, 4, 5), (7, 8)):
        cache.release(keep(cache, *ids))
    cache.release(cache.hold((1, 2, 3)))
    assert cache.take(4) is not None  # two are free
    assert [cache.matched(ids) for ids in ((1, 2, 3), (1, 2, 4, 5), (7, 8))] == [3, 2, 2]
    assert cache.take(1) is not None
    assert [cache.matched(ids) for ids in ((1, 2, 3), (7, 8))] == [3, 1], "a run loses its last tokens alone"
    assert cache.evicted == 3


def test_what_is_held_stays() -> None:
    cache = PrefixCache(1, 5, 1)
    held = keep(cache, 1, 2, 3)
    cache.release(keep(cache, 1, 2, 4))
    assert cache.take(3) is None
    assert cache.matched((1, 2, 4)) == 3, "nothing is evicted where that would not do"
    assert cache.take(2) is not None
    assert cache.matched((1, 2, 4)) == 2
    assert cache.matched((1, 2, 3)) == 3
    cache.release(held)


def test_of_two_that_computed_the_same_one_is_kept() -> None:
    cache = PrefixCache(1, 10, 1)
    holds = [cache.hold((1, 2, 3)) for _ in range(2)]
    slots = [cache.take(3) for _ in range(2)]
    first, second = (cache.keep(hold, (1, 2, 3), own) for hold, own in zip(holds, slots, strict=True))
    assert first.slots.tolist() == second.slots.tolist() == slots[0].tolist()
    assert cache.used == 3
    cache.release(first)
    assert cache.take(8) is None
    cache.release(second)
    assert cache.take(8) is not None


class Shape:
    def __init__(self, pool_shape: tuple[int, int] | None, context: int) -> None:
        self.pool_shape, self.context = pool_shape, context


@pytest.mark.parametrize(("size", "slots"), [(0, []), (1 << 20, [64, 2048]), (100, [10, 20]), (1 << 30, [2560, 5120])])
def test_the_memory_is_shared_out(size: int, slots: list[int]) -> None:
    """A MiB in halves: of 4 * 2 * 1024 and of 4 * 4 * 16 bytes a token; at least a context of each."""
    variants = [Shape((2, 1024), 10), Shape(None, 10), Shape((4, 16), 20)]
    caches = prefix_caches(variants, size)
    assert [cache.slots for cache in caches.values()] == slots
    assert all(
        cache.pool.shape == (*variant.pool_shape[:1], cache.slots + 1, variant.pool_shape[1])
        for variant, cache in caches.items()
    )


@dataclass
class Naive:
    """Every cached prefix by itself, and when it was last released."""

    slots: int
    used: dict[Ids, int] = field(default_factory=dict)
    held: list[Ids] = field(default_factory=list)
    taken: int = 0
    clock: int = 0

    def matched(self, ids: Ids) -> int:
        return next(length for length in range(len(ids), -1, -1) if not length or ids[:length] in self.used)

    def release(self, ids: Ids) -> None:
        self.held.remove(ids)
        self.clock += 1
        for length in range(1, len(ids) + 1):
            self.used[ids[:length]] = self.clock

    def take(self, count: int) -> bool:
        kept = {held[:length] for held in self.held for length in range(1, len(held) + 1)}
        if count > self.slots - self.taken - len(kept):
            return False
        while count > self.slots - self.taken - len(self.used):
            longer = {ids[:-1] for ids in self.used}
            del self.used[min(self.used.keys() - longer - kept, key=self.used.__getitem__)]
        self.taken += count
        return True

    def keep(self, before: Ids, ids: Ids) -> None:
        for length in range(len(before) + 1, len(ids) + 1):
            self.used.setdefault(ids[:length], 0)
        self.held.append(ids)
        self.release(before)
        self.taken -= len(ids) - len(before)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple)


@given(slots=st.integers(13, 25), steps=st.lists(st.tuples(prompts, st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_it_is_the_naive_one(slots: int, steps: list[tuple[Ids, int, int]]) -> None:
    """Each step begins a sequence of a prompt and some tokens more, or goes on with one that was begun."""
    cache, naive = PrefixCache(1, slots, 1), Naive(slots)
    names: dict[Ids, int] = {}  # what the pool has for each prefix
    begun: list[tuple[Prefix, Ids, Ids, np.ndarray]] = []

    def write(ids: Ids, before: int, own: np.ndarray) -> None:
        for length, slot in enumerate(own, before + 1):
            cache.pool[0, slot, 0] = names.setdefault(ids[:length], len(names))

    def check(prefix: Prefix, ids: Ids) -> None:
        expected = [names[ids[: at + 1]] for at in range(prefix.slots.size)]
        assert cache.pool[0, prefix.slots, 0].tolist() == expected

    for ids, more, which in steps:
        if begun and which < 6:  # all of it is computed: keep it, and let it go
            prefix, before, whole, own = begun.pop(which % len(begun))
            write(whole, len(before), own)
            cut = len(whole) - len(whole) // 4  # as if cancelled before the end
            cut = max(cut, len(before))
            kept = cache.keep(prefix, whole[len(before) : cut], own[: cut - len(before)])
            cache.give(own[cut - len(before) :])
            naive.keep(before, whole[:cut])
            naive.taken -= len(whole) - cut
            check(kept, whole)
            assert kept.slots.size == cut
            cache.release(kept)
            naive.release(whole[:cut])
        else:
            whole = ids + (9,) * more
            assert cache.matched(whole) == naive.matched(whole)
            prefix = cache.hold(ids[:-1])
            before = ids[: prefix.slots.size]
            assert len(before) == naive.matched(ids[:-1])
            check(prefix, before)
            naive.held.append(before)
            own = cache.take(len(whole) - len(before))
            assert (own is not None) == naive.take(len(whole) - len(before))
            if own is None:
                assert begun, "one alone always fits"
                cache.release(prefix)
                naive.release(before)
            else:
                begun.append((prefix, before, whole, own))
        assert cache.used == naive.taken + len(naive.used)
        assert cache._stored == len(naive.used)
        for cached in naive.used:
            assert cache.matched(cached) == len(cached)
        for prefix, before, _, _ in begun:
            check(prefix, before)


def test_the_slot_of_padding_is_nobodys() -> None:
    """What is not finite in it would be in every shorter past's sums."""
    cache = PrefixCache(1, 20, 1)
    slots = cache.take(20)
    assert slots is not None
    assert sorted(slots) == list(range(1, 21))
    cache.pool[:, slots] = np.nan
    assert not cache.pool[:, 0].any()


def _floats(pages: int) -> np.ndarray:
    """[pages, 1024] in small pages, none of them touched."""
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(pages, -1)


def _faults_of_writing(array: np.ndarray) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[:, 0] += 1
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not give pages on request")
def test_memory_that_is_populated_is_there_and_holds_what_it_held() -> None:
    fresh, known = _floats(500), _floats(500)
    known[7, 1] = 3.0
    if not populate(known):
        pytest.skip("a kernel before 5.14")
    assert _faults_of_writing(fresh) >= 500
    assert _faults_of_writing(known) < 50  # the interpreter's own
    assert (known[7, 1], known.sum()) == (3.0, 503.0)


def test_slots_have_their_memory_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    width = HUGE_PAGE // 4 // 100  # a page has the floats of 100 slots
    monkeypatch.setattr("service.prefix_cache.populate", lambda array: bool(array.size))
    cache, there = PrefixCache(2, 1000, width), 0
    for taken in range(0, 1000, 10):
        while slots := cache.ahead():
            assert slots.start == there, "each is asked for once, none is left out"
            there = slots.stop
            cache.populate(slots)
        assert there > taken, "one that is taken was asked for before"
        assert there <= taken + 2 * 100 or taken == 0, "no more than soon needed"
        cache.take(10)
    assert there > 1000
    cache.give(np.arange(1, 1001))
    cache.take(10)
    assert cache.ahead() is None, "what was taken before is there"


def test_a_system_that_cannot_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADVISE", None)
    cache = PrefixCache(2, 1000, HUGE_PAGE // 4 // 100)
    slots = cache.ahead()
    assert slots
    cache.populate(slots)
    cache.take(900)
    assert cache.ahead() is None
