"""Batches the prompts of concurrent requests: one bounded queue, as many batches at a time as there are lanes.

    done = await engine.run([Job(variant, ids, top_k), ...])

A batch holds prompts of one variant and of similar length, up to a budget of padded tokens; the variants take
turns. Each lane is a thread that runs a batch on one core: two such runs carry more than one run on two cores
(docs/log.md). Only a batch that is alone takes all lanes at once, where that was measured to be faster for its
variant. A prompt that waits or is computed already is not computed again for another caller. The event loop goes on
reading requests, which are the next batches.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

from service.errors import ApiError
from service.metrics import EngineMetrics
from service.variant import Row, Variant

# A batch of one-token prompts would else hold max_batch_tokens rows of three [V] float32 each:
# 64 rows are 39 MB at V = 50257.
MAX_ROWS = 64
# Padding that a batch may have: a share of its tokens, or so many, which cost less than another run.
PADDING, FREE_PADDING = 1 / 8, 64


@dataclass(frozen=True)
class Job:
    """One prompt for one variant: 1 to context ids, 0 <= top_k <= V."""

    variant: Variant
    ids: list[int]
    top_k: int


@dataclass(frozen=True)
class Done:
    """A job's row, and when what happened to it (seconds; `at` by perf_counter)."""

    row: Row  # its top_ids may be longer than the job's top_k
    queue_s: float
    infer_s: float
    at: float


@dataclass(eq=False)
class _Waiting:
    job: Job
    future: asyncio.Future[Done]
    since: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.ids = tuple(self.job.ids)


@dataclass(eq=False)
class _Batch:
    """Prompts of one variant that are computed together, each with all who wait for it."""

    variant: Variant
    prompts: dict[tuple[int, ...], list[_Waiting]]
    wide: bool = False  # on all lanes

    def __post_init__(self) -> None:
        self.top_k = max(waiting.job.top_k for group in self.prompts.values() for waiting in group)


class Engine:
    """Runs jobs between `async with engine:`; leaving it finishes what is queued."""

    def __init__(self, max_queue: int, max_batch_tokens: int, timeout_s: float, lanes: int = 1) -> None:
        self._max_queue = max_queue
        self._max_batch_tokens = max_batch_tokens
        self._timeout_s = timeout_s
        self._lanes = lanes
        self._queues: dict[Variant, list[_Waiting]] = {}  # none of them empty; the first is served next
        self._running: dict[asyncio.Task[None], _Batch] = {}
        self._wake = asyncio.Event()
        self._open = False
        self._job_s = 0.0  # moving average of a job's share of its batch
        self.metrics = EngineMetrics()

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self._lanes, thread_name_prefix="lane")
        self._open = True
        self._server = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False
        self._wake.set()
        with self._threads:
            await self._server

    @property
    def serving(self) -> bool:
        return self._open and not self._server.done()

    @property
    def waiting(self) -> int:
        """Jobs in the queue; those that are being computed do not count."""
        return sum(map(len, self._queues.values()))

    async def run(self, jobs: Sequence[Job]) -> list[Done]:
        """Each job's result, in order. Cancel it, and what is still queued of it is dropped.

        Raises ApiError: queue_full where not all of them fit, timeout, unavailable.
        """
        self._admit(len(jobs))
        loop = asyncio.get_running_loop()
        mine = [_Waiting(job, loop.create_future()) for job in jobs]
        for waiting in mine:
            if not self._joins(waiting):
                self._queues.setdefault(waiting.job.variant, []).append(waiting)
        self._wake.set()
        reason = "failed"
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.gather(*(waiting.future for waiting in mine))
        except asyncio.CancelledError:
            reason = "client_gone"
            raise
        except TimeoutError:
            reason = "timeout"
            raise ApiError(
                "timeout",
                f"no answer within {self._timeout_s:g} s; send fewer prompts at once, or try later",
            ) from None
        finally:
            self.metrics.dropped(reason, self._drop(set(mine)))

    def _admit(self, jobs: int) -> None:
        if not self.serving:
            raise ApiError("unavailable", "the service is stopping; try another instance, or later")
        waiting = self.waiting
        if waiting + jobs > self._max_queue:
            self.metrics.refused(jobs)
            seconds = min(60, max(1, math.ceil(waiting * self._job_s)))
            raise ApiError(
                "queue_full",
                f"{waiting} prompts wait and {jobs} more do not fit in the queue of {self._max_queue}; "
                f"try again in {seconds} s",
                headers={"retry-after": str(seconds)},
            )

    def _drop(self, gone: set[_Waiting]) -> int:
        """Take what is still queued of `gone` out of it; how many that were."""
        before = self.waiting
        for variant in {waiting.job.variant for waiting in gone} & self._queues.keys():
            if left := [waiting for waiting in self._queues[variant] if waiting not in gone]:
                self._queues[variant] = left
            else:
                del self._queues[variant]
        return before - self.waiting

    def _joins(self, waiting: _Waiting) -> bool:
        """Whether it waits for a row that is being computed."""
        for batch in self._running.values():
            fits = batch.variant is waiting.job.variant and waiting.job.top_k <= batch.top_k
            if fits and waiting.ids in batch.prompts:
                batch.prompts[waiting.ids].append(waiting)
                return True
        return False

    async def _serve(self) -> None:
        while self._open or self._queues or self._running:
            while self._queues and self._free:
                batch = self._next_batch()
                batch.wide = batch.variant.wide and not self._queues and not self._running
                task = asyncio.create_task(self._run_batch(batch))
                self._running[task] = batch
                task.add_done_callback(self._ended)
            self._wake.clear()
            await self._wake.wait()

    @property
    def _free(self) -> bool:
        """Whether a lane is."""
        return len(self._running) < self._lanes and not any(batch.wide for batch in self._running.values())

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wake.set()

    def _next_batch(self) -> _Batch:
        """The longest-waiting job of the variant whose turn it is, with those nearest to it in length."""
        variant = next(iter(self._queues))
        queue = self._queues.pop(variant)
        groups: dict[tuple[int, ...], list[_Waiting]] = {}
        for waiting in queue:
            groups.setdefault(waiting.ids, []).append(waiting)
        first = len(queue[0].ids)
        longest, tokens, taken = 0, 0, set[tuple[int, ...]]()
        for ids in sorted(groups, key=lambda ids: abs(len(ids) - first)):
            longest, tokens = max(longest, len(ids)), tokens + len(ids)
            padded = longest * (len(taken) + 1)
            too_much = padded > self._max_batch_tokens or padded - tokens > max(PADDING * tokens, FREE_PADDING)
            if taken and (too_much or len(taken) == MAX_ROWS):
                break
            taken.add(ids)
        if left := [waiting for waiting in queue if waiting.ids not in taken]:
            self._queues[variant] = left  # at the end: the other variants come first
        return _Batch(variant, {ids: group for ids, group in groups.items() if ids in taken})

    async def _run_batch(self, batch: _Batch) -> None:
        variant, asked = batch.variant, list(batch.prompts)

        def compute() -> tuple[float, list[Row], float]:
            start = perf_counter()
            rows = variant.run(asked, batch.top_k, batch.wide)
            return start, rows, perf_counter()

        try:
            start, rows, end = await asyncio.get_running_loop().run_in_executor(self._threads, compute)
            if len(rows) != len(asked):
                raise ValueError(f"variant {variant.name!r} gives {len(rows)} rows for {len(asked)} prompts")
        except Exception as error:
            for waiting in itertools.chain(*batch.prompts.values()):
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        finally:
            groups, batch.prompts = list(batch.prompts.values()), {}  # nobody joins it from here on
        self._job_s += 0.1 * ((end - start) / len(asked) / self._lanes - self._job_s)
        lengths = list(map(len, asked))
        self.metrics.computed(variant.name, lengths, padded=len(asked) * max(lengths))
        for group, row in zip(groups, rows, strict=True):
            for waiting in group:
                if not waiting.future.done():  # its caller may have left
                    queued = max(0.0, start - waiting.since)  # one that joined later waited for no lane
                    waiting.future.set_result(Done(row, queued, end - max(start, waiting.since), end))
