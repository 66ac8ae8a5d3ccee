"""Batches the prompts of concurrent requests: one bounded queue, one batch at a time.

    done = await engine.run([Job(variant, ids, top_k), ...])

A batch holds prompts of one variant and of similar length, up to a budget of padded tokens; the
variants take turns. The batch runs in a thread, so that the event loop goes on reading requests,
which are the next batch.
"""

from __future__ import annotations

import asyncio
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


class Engine:
    """Runs jobs between `async with engine:`; leaving it finishes what is queued."""

    def __init__(self, max_queue: int, max_batch_tokens: int, timeout_s: float) -> None:
        self._max_queue = max_queue
        self._max_batch_tokens = max_batch_tokens
        self._timeout_s = timeout_s
        self._queues: dict[Variant, list[_Waiting]] = {}  # none of them empty; the first is served next
        self._wake = asyncio.Event()
        self._open = False
        self._job_s = 0.0  # moving average of a job's share of its batch
        self.metrics = EngineMetrics()

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._open = True
        self._server = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False
        self._wake.set()
        with self._thread:
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

    async def _serve(self) -> None:
        while self._open or self._queues:
            if self._queues:
                await self._run_batch(*self._next_batch())
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next_batch(self) -> tuple[Variant, list[_Waiting]]:
        """The longest-waiting job of the variant whose turn it is, with those nearest to it in length."""
        variant = next(iter(self._queues))
        queue = self._queues.pop(variant)
        first = len(queue[0].job.ids)
        longest, batch = 0, set[_Waiting]()
        for waiting in sorted(queue, key=lambda waiting: abs(len(waiting.job.ids) - first)):
            longest = max(longest, len(waiting.job.ids))
            if batch and (longest * (len(batch) + 1) > self._max_batch_tokens or len(batch) == MAX_ROWS):
                break
            batch.add(waiting)
        if left := [waiting for waiting in queue if waiting not in batch]:
            self._queues[variant] = left  # at the end: the other variants come first
        return variant, [waiting for waiting in queue if waiting in batch]

    async def _run_batch(self, variant: Variant, batch: list[_Waiting]) -> None:
        def compute() -> tuple[float, list[tuple[_Waiting, Row]], float]:
            start = perf_counter()
            rows = variant.run([w.job.ids for w in batch], max(w.job.top_k for w in batch))
            return start, list(zip(batch, rows, strict=True)), perf_counter()

        try:
            start, computed, end = await asyncio.get_running_loop().run_in_executor(self._thread, compute)
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        self._job_s += 0.1 * ((end - start) / len(batch) - self._job_s)
        lengths = [len(waiting.job.ids) for waiting in batch]
        self.metrics.computed(variant.name, lengths, padded=len(batch) * max(lengths))
        for waiting, row in computed:
            if not waiting.future.done():  # its caller may have left
                waiting.future.set_result(Done(row, start - waiting.since, end - start, end))
