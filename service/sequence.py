"""A job on its way through the engine: what a route asks for, what it gets, and how far its tokens are computed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from service.prefix_cache import Prefix, Slots
from service.variant import Piece, Row, Rows, Variant

NO_SLOTS: Slots = np.empty(0, np.int64)


class Reader(Protocol):
    """Takes a job's rows as they are computed, in the thread of a lane and in order."""

    first: int  # rows are wanted after the prompt's tokens first .. T - 1; T - 1: after the last alone, 0: after each
    top_k: int

    def read(self, rows: Rows) -> int | None:
        """The token to compute next, or None: finished.

        First come the prompt's rows, maybe in several pieces, of which the last one's answer counts; then one row for
        each token that it gave. What it raises fails its job alone.
        """
        ...


@dataclass(frozen=True)
class Job:
    """One prompt for one variant: 1 to `context` ids, 0 <= top_k <= V.

    With a reader also its rows, and then up to `max_tokens` tokens that the reader gives: after so many, or where the
    context ends, it is finished without being asked again.
    """

    variant: Variant
    ids: list[int]
    top_k: int = 0
    reader: Reader | None = None
    max_tokens: int = 0
    bytes: int = 0  # that the reader keeps, at most

    @property
    def tokens(self) -> int:
        """What may have to be computed."""
        return min(len(self.ids) + self.max_tokens, self.variant.context)


@dataclass(frozen=True)
class Done:
    """A finished job, and when what happened to it (seconds; `at` by perf_counter)."""

    row: Row | None  # after the last token, where there was no reader; its top_ids may be longer than the job's top_k
    queue_s: float
    infer_s: float
    at: float
    cached_tokens: int = 0  # of the prompt, that were found computed

    @property
    def only(self) -> Row:
        """The row of a job without a reader."""
        assert self.row is not None
        return self.row


class Runs(Protocol):
    """The engine, as a route sees it."""

    async def run(self, jobs: Collection[Job]) -> list[Done]: ...


@dataclass(eq=False)
class Waiter:
    """A caller of one job. Without a reader its first row is the result."""

    job: Job
    sequence: Sequence = field(init=False)  # that answers it
    result: asyncio.Future[Done]
    first: asyncio.Future[Done]
    since: float = field(default_factory=perf_counter)

    def give(self, future: asyncio.Future[Done], done: Done) -> None:
        if not future.done():  # the caller may have left
            future.set_result(done)

    def fail(self, error: Exception) -> None:
        for future in {self.first, self.result}:
            if not future.done():
                future.set_exception(error)


@dataclass(eq=False)
class Sequence:
    """A prompt and what is generated after it, T tokens by now, for all who wait for the same."""

    job: Job
    waiters: list[Waiter]
    top_k: int
    ids: list[int]
    asked: int  # the token after which the next row is wanted
    arrived: float = field(default_factory=perf_counter)
    begun: bool = False  # it is or was in a batch
    running: bool = False  # it is in a batch
    started: float = 0.0  # when the first one was, by perf_counter
    left: str = ""  # why nobody waits for it any more
    prefix: Prefix | None = None  # what it holds of the cache
    slots: Slots = field(default_factory=lambda: NO_SLOTS)  # of its tokens, those to come too
    computed: int = 0  # tokens that have their keys and values in their slots
    cached: int = 0  # of them, those that were found so
    key: tuple[int, ...] = ()  # the first tokens of it that others wait for instead of computing them too
    followers: dict[Sequence, None] = field(default_factory=dict)  # those who do
    leader: Sequence | None = None  # whom it waits for
    shared: int = 0  # until so many of its tokens are computed

    @classmethod
    def of(cls, waiter: Waiter) -> Sequence:
        job = waiter.job
        last = len(job.ids) - 1
        asked = job.reader.first if job.reader else last
        assert 0 <= asked <= last, f"rows are wanted from token {asked} of a prompt of {last + 1}"
        return cls(job, [waiter], max(job.top_k, job.reader.top_k if job.reader else 0), [*job.ids], asked)

    @property
    def prefilled(self) -> bool:
        """Whether all rows of the prompt are given."""
        return self.asked >= len(self.job.ids)

    @property
    def read(self) -> bool:
        """Whether any row was given."""
        return self.asked > (self.job.reader.first if self.job.reader else len(self.job.ids) - 1)

    @property
    def may_go_on(self) -> bool:
        """Whether one more token has room."""
        return len(self.ids) - len(self.job.ids) < self.job.max_tokens and len(self.ids) < self.job.variant.context

    def piece(self, tokens: int, rows: int) -> Piece:
        """Its next tokens, up to so many, and rows, up to so many; what has no slots cannot be cut between its rows."""
        start, end = self.computed, min(len(self.ids), self.asked + rows)
        if stored := self.slots.size > start:
            end = min(end, start + tokens)
        elif not self.job.variant.cached:
            end = self.asked + 1  # each row is a prompt of its own
            while end < len(self.ids) and end < self.asked + rows and self._as_prompts(end + 1) <= tokens:
                end += 1
        return Piece(
            self.ids[start:end],
            self.slots[:start],
            self.slots[start:end] if stored else NO_SLOTS,
            max(0, end - self.asked),
        )

    def _as_prompts(self, end: int) -> int:
        """Tokens of the prompts that end after `asked`, ..., after `end` - 1."""
        return sum(range(self.asked + 1, end + 1))
