"""Keys and values of computed tokens, kept for whatever comes next that starts with the same tokens.

    pool [L, S + 1, W]   S slots, each for one token: its keys and values in all L layers; and slot 0, for nobody's
    a tree of runs       tokens one after another, each with its slot; those that go on after one differ in their first

A sequence holds the run that it starts with, computes the tokens after it into slots that it took, and keeps those in
the tree for others. What nobody holds is evicted from the ends, the least recently used first, when slots are needed.
All of it happens on the event loop; what a lane writes to the pool are slots that only its own sequences have.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from service.memory import HUGE_PAGE, populate
from service.variant import Variant

Slots = NDArray[np.int64]
FLOAT_BYTES = 4
MAX_CONTEXTS = 256  # more find hardly more, and the process would grow for longer before it settles


@dataclass(eq=False)
class _Run:
    """Tokens one after another."""

    ids: list[int]
    slots: Slots
    parent: _Run | None
    children: dict[int, _Run] = field(default_factory=dict)  # by their first token
    holders: int = 0  # of it, or of what comes after it
    used: int = 0  # when, by the cache's clock


@dataclass(frozen=True)
class Prefix:
    """Cached tokens that stay until they are released, from the first token on."""

    run: _Run
    slots: Slots


class PrefixCache:
    """One variant's pool and tree."""

    def __init__(self, layers: int, slots: int, width: int) -> None:
        # Of zeros: memory that is not touched costs nothing, and the graph's masked sums must be finite.
        # Slot 0 stays so: shorter pasts are padded with it, and 0 times what is not finite is not 0.
        self.pool = np.zeros((layers, slots + 1, width), np.float32)
        self.evicted = 0  # tokens, ever
        self._root = _Run([], np.empty(0, np.int64), None)
        self._free = np.arange(1, slots + 1)[::-1].copy()  # a stack, its top at `_free_count`
        self._free_count = slots
        self._never_taken = slots  # of the free ones: those at the stack's bottom
        self._populated = 0  # slots, from 0 on, whose memory is there or was asked for
        self._stored = 0  # tokens in the tree
        self._held = 0  # of them, those that somebody holds
        self._idle: list[tuple[int, _Run]] = []  # runs that nobody holds and that none follows, by last use
        self._clock = 0

    @property
    def slots(self) -> int:
        return self._free.size

    @property
    def used(self) -> int:
        """Slots that are taken or in the tree."""
        return self.slots - self._free_count

    @property
    def available(self) -> int:
        """Slots that are free, or whose tokens nobody holds."""
        return self._free_count + self._stored - self._held

    def matched(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are cached."""
        return self._find(self._root, ids)[1]

    def hold(self, ids: Sequence[int]) -> Prefix:
        """The longest cached prefix of `ids`, kept from eviction until it is released."""
        run, _, inside = self._find(self._root, ids)
        return self._hold(self._split(run, inside))

    def release(self, prefix: Prefix) -> None:
        self._clock += 1
        prefix.run.used = self._clock
        run: _Run | None = prefix.run
        while run:
            run.holders -= 1
            self._held -= 0 if run.holders else len(run.ids)
            run = run.parent
        self._rest(prefix.run)

    def take(self, count: int) -> Slots | None:
        """So many slots, evicting what it takes; None, and nothing evicted, where that would not do."""
        if count > self.available:
            return None
        while self._free_count < count:
            self._evict(count - self._free_count)
        self._free_count -= count
        self._never_taken = min(self._never_taken, self._free_count)
        return self._free[self._free_count : self._free_count + count][::-1].copy()

    def give(self, slots: Slots) -> None:
        """Slots that were taken and are not needed."""
        self._free[self._free_count : self._free_count + slots.size] = slots[::-1]
        self._free_count += slots.size

    def ahead(self) -> slice | None:
        """Slots to `populate` before they are taken, each asked for once; None where there are enough of them."""
        step = max(1, HUGE_PAGE // (FLOAT_BYTES * self.pool.shape[2]))
        taken = self.slots - self._never_taken
        if self._populated > self.slots or self._populated - taken > step // 2:
            return None
        start, self._populated = self._populated, self._populated + step
        return slice(start, self._populated)

    def populate(self, slots: slice) -> None:
        """Has their memory. Blocks, without the interpreter's lock; safe from any thread, while lanes write."""
        for layer in self.pool:
            if not populate(layer[slots]):
                self._populated = self.slots + 1  # the system cannot: it is not asked again
                return

    def keep(self, prefix: Prefix, ids: Sequence[int], slots: Slots) -> Prefix:
        """Hold `prefix` and the tokens `ids` after it, computed into `slots`, instead of `prefix`.

        Of those that somebody else kept meanwhile, `slots` are given back and the tree's stand in the result.
        """
        run, known, inside = self._find(prefix.run, ids)
        run = self._split(run, inside)
        self.give(slots[:known])
        self._hold(run)
        self.release(prefix)
        if ids := list(ids[known:]):
            slots = slots[known:]
            if run.holders == 1 and not run.children and run.parent:  # ours alone: a text that grows stays one run
                run.ids += ids
                run.slots = np.concatenate((run.slots, slots))
            else:
                run.children[ids[0]] = run = _Run(ids, slots, run, holders=1)
            self._stored += len(ids)
            self._held += len(ids)
        return Prefix(run, _path(run))

    def _find(self, run: _Run, ids: Sequence[int]) -> tuple[_Run, int, int]:
        """Where `ids` lead from the end of `run`: the last run, how many of them that takes, how much of that run."""
        found, inside = 0, len(run.ids)
        while inside == len(run.ids) and found < len(ids) and (child := run.children.get(ids[found])):
            run, inside = child, common(child.ids, ids[found : found + len(child.ids)])
            found += inside
        return run, found, inside

    def _split(self, run: _Run, at: int) -> _Run:
        """The run of the first `at` tokens of `run`, which goes on with the others."""
        if at == len(run.ids):
            return run
        assert run.parent
        head = _Run(run.ids[:at], run.slots[:at], run.parent, {run.ids[at]: run}, run.holders, run.used)
        run.parent.children[run.ids[0]] = head
        run.ids, run.slots, run.parent = run.ids[at:], run.slots[at:], head
        return head

    def _hold(self, run: _Run) -> Prefix:
        if self._is_idle(run):
            del self._idle[bisect.bisect_left(self._idle, run.used, key=itemgetter(0))]
        above: _Run | None = run
        while above:
            self._held += 0 if above.holders else len(above.ids)
            above.holders += 1
            above = above.parent
        return Prefix(run, _path(run))

    def _is_idle(self, run: _Run) -> bool:
        return not run.holders and not run.children and run.parent is not None

    def _rest(self, run: _Run) -> None:
        if self._is_idle(run):
            bisect.insort(self._idle, (run.used, run), key=itemgetter(0))

    def _evict(self, most: int) -> None:
        """Up to `most` tokens, from the end of the run that was not used for longest."""
        _, run = self._idle[0]
        kept = max(0, len(run.ids) - most)
        gone = run.slots[kept:]
        self.give(gone)
        self.evicted += gone.size
        self._stored -= gone.size
        if kept:
            run.ids, run.slots = run.ids[:kept], run.slots[:kept]
            return
        del self._idle[0]
        assert run.parent
        del run.parent.children[run.ids[0]]
        self._rest(run.parent)  # by its own last use, which is older than that of all other ends


def prefix_caches(variants: Collection[Variant], size: int) -> dict[Variant, PrefixCache]:
    """A cache for each variant that can have one, all of `size` bytes in total; none where that is 0.

    A whole context has to fit into each, so that it may come to more; a small model's has MAX_CONTEXTS.
    """
    shapes = {variant: variant.pool_shape for variant in variants if variant.pool_shape}
    if not size or not shapes:
        return {}
    caches = {}
    for variant, (layers, width) in shapes.items():
        slots = size // len(shapes) // (FLOAT_BYTES * layers * width)
        slots = max(variant.context, min(slots, MAX_CONTEXTS * variant.context))
        caches[variant] = PrefixCache(layers, slots, width)
    return caches


def common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens are the same."""
    if some == others:
        return len(some)
    pairs = enumerate(zip(some, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(some), len(others)))


def _path(run: _Run) -> Slots:
    """The slots from the first token on."""
    slots = [run.slots]
    while run.parent:
        run = run.parent
        slots.append(run.slots)
    return np.concatenate(slots[::-1])
