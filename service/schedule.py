"""Which tokens of one variant are computed together next, and where their keys and values go.

A batch has first the next token of each sequence that generates, then prompts, the longest-waiting first, up to a
budget of tokens and of rows, a part of which is for prompts alone; a prompt that does not fit goes on in the next
batch. It takes the slots for all it may come to before it starts, so that what has started always finishes; one alone
always finds room, since a pool has a slot for each token of the context. Where a prompt begins like one that is being
computed, it waits until that one has what they share.
"""

from __future__ import annotations

import math
from itertools import chain

import numpy as np

from service.prefix_cache import PrefixCache, common
from service.sequence import NO_SLOTS, Sequence
from service.variant import Piece, Variant

# Rows of a batch, in memory: 55 at V = 50257, 341 at V = 8192.
BATCH_ROW_BYTES = 1 << 25
# So many tokens that another prompt is computing are worth waiting for it.
SHARED = 16
# Up to so many tokens a run takes as long as it takes to read the weights, and two lanes would read them twice: 8
# sequences that generate, at 14M parameters in fp32, 290 tokens/s together and 187 in two lanes.
LANE_TOKENS = 32
# Weights of more than a processor's last cache are read from memory, which two lanes share: 8 sequences that generate
# gain 18 % in one lane at 14M parameters in fp32, and lose 24 % in int8, whose weights stay in 32 MB.
CACHE_BYTES = 32 << 20
# Of a batch's tokens and rows, what those that generate leave to prompts; of the rows no more than there are prompts.
PROMPT_SHARE = 1 / 8
# Padding that a batch may have, where the graph does not drop it: a share of its tokens, or so many, which cost less
# than another run.
PADDING, FREE_PADDING = 1 / 8, 64

# Scores of a head, where attention runs as standard operators over the longest of a batch: 4 MB, three at a time.
MOST_SCORES = 1 << 20

Batch = list[tuple[Sequence, Piece]]


class Schedule:
    """The sequences of one variant. On the event loop alone."""

    def __init__(self, variant: Variant, cache: PrefixCache | None, max_batch_tokens: int) -> None:
        self.cache = cache
        self._variant = variant
        self._max_tokens = max(2, max_batch_tokens)  # one that is generated, and one of a prompt
        self._max_rows = max(2, BATCH_ROW_BYTES // variant.row_bytes)
        self._prompt_tokens = math.ceil(PROMPT_SHARE * self._max_tokens)
        self._prompt_rows = math.ceil(PROMPT_SHARE * self._max_rows)
        self._full = False  # whether some found no slots for the last batch
        self._found = 0  # slots that there were then
        # Each in the order of arrival; what is in a batch, or follows another, is in none of them.
        self._generating: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._waiting: dict[Sequence, None] = {}
        self._leaders: dict[tuple[int, ...], Sequence] = {}

    def __len__(self) -> int:
        """Sequences that wait for a batch, or for slots first."""
        return len(self._generating) + len(self._prefilling) + len(self._waiting)

    @property
    def able(self) -> bool:
        """Whether any could be in the next batch: those of readers that found no slots wait until there are more."""
        if self._generating or self._prefilling:
            return True
        if self.cache and self._full and self.cache.available <= self._found:
            return any(not sequence.job.reader for sequence in self._waiting)
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """It is new, or its batch is over."""
        # Where there is no pool, each of its tokens costs as much as its prompt did: it waits in turn.
        if not sequence.begun or not self.cache:
            self._waiting[sequence] = None
        elif sequence.prefilled:
            self._generating[sequence] = None
        else:
            self._prefilling[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """It is in no batch and will not be in one."""
        for queue in (*self._queues, sequence.leader.followers if sequence.leader else {}):
            queue.pop(sequence, None)
        self.end(sequence)

    @property
    def _queues(self) -> tuple[dict[Sequence, None], ...]:
        return self._generating, self._prefilling, self._waiting

    @property
    def joins(self) -> bool:
        """Whether what generates had better wait for the few tokens that run, and go on together with them."""
        few = len(self._generating) <= LANE_TOKENS and not (self._prefilling or self._waiting)
        return few and self._variant.file_bytes > CACHE_BYTES

    def next_batch(self, lanes: int) -> Batch:
        """What a lane computes next, where so many are free for this variant; empty where all wait for slots."""
        ready = list(chain(*self._queues))
        if ready and not self._variant.cached:  # near to the first in length
            first = len(ready[0].ids)
            ready.sort(key=lambda sequence: abs(len(sequence.ids) - first))
        # Those that found no slots last time are not shared out: the other lanes would wait for what cannot start.
        able = [sequence for sequence in ready if sequence.prefix or not (self._full and sequence.job.reader)]
        tokens = sum(len(sequence.ids) - sequence.computed for sequence in able)
        most = max(1, math.ceil(len(able) / lanes)) if tokens > LANE_TOKENS else len(ready)
        batch: Batch = []
        tokens, rows, full = self._max_tokens, self._max_rows, False
        prompt_rows = min(self._prompt_rows, len(able) - len(self._generating))
        for sequence in ready:
            if len(batch) == most or tokens <= 0 or rows <= 0:
                break
            if prompt_rows and sequence in self._generating and (tokens <= self._prompt_tokens or rows <= prompt_rows):
                continue
            if self.cache and not sequence.prefix:
                if full and sequence.job.reader:
                    continue  # 1000 of them would cost 7 ms to look up
                if self._follows(sequence, self.cache):
                    continue
                if not self._start(sequence, self.cache, tokens, full):
                    full = True  # the next free slots are for this one
                    continue
            piece = sequence.piece(tokens, rows)
            cost = self._variant.tokens_of(piece)
            if batch and (cost > tokens or self._pads_too_much(batch, piece)):
                break
            batch.append((sequence, piece))
            tokens -= cost
            rows -= max(1, piece.rows)
        self._full = full
        if self.cache and full:
            self._found = self.cache.available
        for sequence, _ in batch:
            for queue in self._queues:
                queue.pop(sequence, None)
        return batch

    def computed(self, sequence: Sequence, piece: Piece) -> None:
        """A batch with that piece of it is over."""
        sequence.asked += piece.rows
        if piece.slots.size:
            sequence.computed += len(piece.ids)
            if sequence.computed == len(sequence.job.ids):
                self._store(sequence)
                self._release_followers(sequence)
            elif any(follower.shared <= sequence.computed for follower in sequence.followers):
                self._store(sequence)
                self._release_followers(sequence, sequence.computed)
                self._lead(sequence)

    def end(self, sequence: Sequence) -> None:
        """It is in no queue any more: what is computed of it stays in the cache, as long as there is room."""
        self._release_followers(sequence)
        if self.cache and sequence.prefix:
            self._store(sequence)
            self.cache.give(sequence.slots[sequence.computed :])
            self.cache.release(sequence.prefix)
            sequence.prefix = None

    def _follows(self, sequence: Sequence, cache: PrefixCache) -> bool:
        """Whether it waits from now on, for one that computes its next tokens."""
        known = cache.matched(sequence.ids)
        sequence.key = tuple(sequence.ids[: known + SHARED])
        leader = self._leaders.get(sequence.key)
        if leader is None or sequence.asked < known + SHARED:
            return False
        del self._waiting[sequence]
        leader.followers[sequence] = None
        sequence.leader = leader
        sequence.shared = common(sequence.ids[: sequence.asked], leader.job.ids)
        return True

    def _lead(self, sequence: Sequence) -> None:
        """Those that come from now on may wait for its next tokens, after what is stored of it."""
        sequence.key = tuple(sequence.job.ids[: sequence.computed + SHARED])
        if len(sequence.key) == sequence.computed + SHARED:
            self._leaders.setdefault(sequence.key, sequence)

    def _start(self, sequence: Sequence, cache: PrefixCache, tokens: int, full: bool) -> bool:
        """Take what the cache has of it, and slots for the rest; False where it has to wait for these."""
        prefix = cache.hold(sequence.ids[: sequence.asked])
        known = prefix.slots.size
        slots = None if full else cache.take(sequence.job.tokens - known)
        if slots is None:
            if sequence.job.reader or len(sequence.ids) - known > tokens:
                cache.release(prefix)
                return False
            slots = NO_SLOTS  # it is answered by this batch, and not kept
        else:
            self._leaders.setdefault(sequence.key, sequence)
        sequence.prefix = prefix
        sequence.slots = np.concatenate((prefix.slots, slots))
        sequence.computed = sequence.cached = known
        return True

    def _store(self, sequence: Sequence) -> None:
        """Keep in the cache what is computed of it."""
        assert self.cache
        assert sequence.prefix
        known, end = sequence.prefix.slots.size, sequence.computed
        if end > known:
            own = sequence.slots[known:end]
            sequence.prefix = self.cache.keep(sequence.prefix, sequence.ids[known:end], own)
            sequence.slots = np.concatenate((sequence.prefix.slots, sequence.slots[end:]))

    def _release_followers(self, sequence: Sequence, computed: int | None = None) -> None:
        """It leads no more. Those that share more than `computed` of it go on waiting, where that is given."""
        if self._leaders.get(sequence.key) is sequence:
            del self._leaders[sequence.key]
        released = [each for each in sequence.followers if computed is None or each.shared <= computed]
        for follower in released:
            follower.leader = None
            del sequence.followers[follower]
        if released:
            both = {**dict.fromkeys(released), **self._waiting}
            self._waiting = dict.fromkeys(sorted(both, key=lambda each: each.arrived))

    def _pads_too_much(self, batch: Batch, piece: Piece) -> bool:
        pieces = [*(each for _, each in batch), piece]
        lengths = [len(each.ids) for each in pieces]
        if self._variant.cached:
            keys = max(lengths) + max(each.past.size for each in pieces)
            return self._variant.pads and len(pieces) * max(lengths) * keys > MOST_SCORES
        padded = max(lengths) * len(lengths)
        return padded > self._max_tokens or padded - sum(lengths) > max(PADDING * sum(lengths), FREE_PADDING)
