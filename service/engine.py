"""Runs the jobs of concurrent requests: batches of packed tokens, as many at a time as there are lanes.

    done = await engine.run([Job(variant, ids, top_k), ...])

The life of a job: admitted or refused with 429; its variant's turn comes, since they take turns; a batch of tokens is
formed (service/schedule.py) and computed by a lane, a thread that runs sessions of one core; its rows go to its
reader, whose token makes it ready for another batch, or it is done. Two lanes carry more than one run on two cores
(docs/log.md); only a batch that is alone takes all of them, where that was measured to be faster. A lane whose
sequences all generate goes on with their next tokens by itself, until one of them ends or somebody waits: else each
token would wait for the event loop to wake, and for the lane to wake again. A prompt that waits or is computed already
is not computed again for another caller. The event loop goes on reading requests, which are the next batches.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Self

from service.errors import ApiError
from service.metrics import EngineMetrics
from service.prefix_cache import PrefixCache
from service.schedule import LANE_TOKENS, Batch, Schedule
from service.sequence import Done, Job, Reader, Sequence, Waiter
from service.variant import Piece, Row, Rows, Variant

__all__ = ["Done", "Engine", "Job", "Reader", "Row", "Rows"]


@dataclass(eq=False)
class _Run:
    """A batch that a lane computes."""

    variant: Variant
    tokens: int
    wide: bool
    goes_on: bool  # the lane may go on by itself with the tokens that all of its sequences generate
    taken: int = 0  # steps that it has gone on after, and that the event loop knows of


Answer = Row | int | None | Exception  # the row itself, a reader's next token, nothing, or what went wrong
Computed = tuple[float, list[Answer], float]  # when it began, each sequence's answer, when it ended


class Engine:
    """Runs jobs between `async with engine:`; leaving it finishes what is queued."""

    def __init__(
        self,
        max_queue: int,
        max_batch_tokens: int,
        timeout_s: float,
        lanes: int = 1,
        *,
        max_queue_tokens: int = 1 << 19,
        max_queue_bytes: int = 1 << 30,
        caches: Mapping[Variant, PrefixCache] | None = None,
    ) -> None:
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._max_queue_bytes = max_queue_bytes
        self._max_batch_tokens = max_batch_tokens
        self._timeout_s = timeout_s
        self._lanes = lanes
        self._caches = caches or {}
        self._schedules: dict[Variant, Schedule] = {}  # the first is served next
        self._running: dict[int, _Run] = {}  # by the batch's number
        self._batches = 0
        self._unfinished: set[Sequence] = set()
        self._same: dict[tuple[Variant, tuple[int, ...]], Sequence] = {}  # of those without a reader
        self._open = False
        self._broken = False  # by a defect of ours
        self._pumping = False  # before this turn of the event loop ends
        self._drained = asyncio.Event()
        self._waiting = 0
        self._tokens = 0  # of all requests that are not answered
        self._bytes = 0  # of their rows, or of what readers keep of them
        self._token_s = 0.0  # moving average of a token's share of its batch
        self.on_work: Callable[[], None] | None = None  # called as jobs come
        self.metrics = EngineMetrics()

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self._lanes, thread_name_prefix="lane")
        self._memory = ThreadPoolExecutor(1, thread_name_prefix="memory")
        for cache in self._caches.values():
            self._populate(cache)
        self._open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False
        self._wake()
        with self._threads, self._memory:
            await self._drained.wait()

    def give_up(self) -> None:
        """Fail whatever is still waited for: the service stops, and has waited for it as long as it may."""
        error = ApiError("unavailable", "the service is stopping and waits no longer; ask another instance, or later")
        for sequence in self._unfinished:
            for waiter in sequence.waiters:
                waiter.fail(error)

    @property
    def serving(self) -> bool:
        return self._open and not self._broken

    @property
    def waiting(self) -> int:
        """Jobs in the queue; those that are being computed do not count."""
        return self._waiting

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is computed."""
        return not self._unfinished

    def tell(self) -> None:
        """Bring those metrics up to date that say how things are now."""
        running = sum(sequence.begun for sequence in self._unfinished)
        self.metrics.now(self._waiting, running, {variant.name: cache for variant, cache in self._caches.items()})

    async def run(self, jobs: Collection[Job]) -> list[Done]:
        """Each job's result, in order. Cancel it, and what is not computed of it is dropped.

        Raises ApiError: queue_full where not all of them fit, too_large where they never will, timeout where those
        with readers had no row in time, or one without had not its own, unavailable; and what a job's reader raised.
        """
        if self.on_work:
            self.on_work()
        tokens = sum(job.tokens for job in jobs)
        # A reader's rows are gone once it read them, but for what it makes of them.
        size = sum(job.bytes if job.reader else job.variant.row_bytes for job in jobs)
        self._admit(len(jobs), tokens, size)
        self._tokens += tokens
        self._bytes += size
        mine: list[Waiter] = []
        reason = "failed"
        try:
            for job in jobs:
                mine.append(self._enter(job))
            self._wake()
            async with asyncio.timeout(self._timeout_s):
                await _in_time(mine)
            return await _all([waiter.result for waiter in mine])
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
            self._tokens -= tokens
            self._bytes -= size
            for waiter in mine:
                self._leave(waiter, reason)

    def _admit(self, jobs: int, tokens: int, size: int) -> None:
        if not self.serving:
            raise ApiError("unavailable", "the service is stopping; try another instance, or later")
        for what, now, more, most in (
            ("prompts", self._waiting, jobs, self._max_queue),
            ("tokens", self._tokens, tokens, self._max_queue_tokens),
            ("bytes of probabilities", self._bytes, size, self._max_queue_bytes),
        ):
            if more > most:
                raise ApiError(
                    "too_large", f"the request asks for {more} {what}; allowed: {most}; send several requests"
                )
            if now + more > most:
                self.metrics.refused(jobs)
                seconds = min(60, max(1, math.ceil(self._tokens * self._token_s)))
                raise ApiError(
                    "queue_full",
                    f"{now} {what} wait and {more} more do not fit in the queue of {most}; try again in {seconds} s",
                    headers={"retry-after": str(seconds)},
                )

    def _enter(self, job: Job) -> Waiter:
        """One who waits for `job`: for a sequence of its own, or with others who ask for the same."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Done] = loop.create_future()
        waiter = Waiter(job, result, loop.create_future() if job.reader else result)
        if not job.reader:
            key = job.variant, tuple(job.ids)
            same = self._same.get(key)
            if same and not (same.begun and job.top_k > same.top_k):
                waiter.sequence = same
                same.waiters.append(waiter)
                same.top_k = max(same.top_k, job.top_k)
                same.left = ""
                self._waiting += not same.begun
                return waiter
        waiter.sequence = sequence = Sequence.of(waiter)
        if not job.reader:
            self._same[key] = sequence
        self._unfinished.add(sequence)
        self._waiting += 1
        self._schedule(job.variant).add(sequence)
        return waiter

    def _schedule(self, variant: Variant) -> Schedule:
        if variant not in self._schedules:
            cache = self._caches.get(variant)
            self._schedules[variant] = Schedule(variant, cache, self._max_batch_tokens)
        return self._schedules[variant]

    def _leave(self, waiter: Waiter, reason: str) -> None:
        """It does not wait any more; what nobody waits for is dropped, once it is in no batch."""
        for future in (waiter.first, waiter.result):
            if not future.cancel() and not future.cancelled():
                future.exception()  # another one's was raised, or will not be waited for
        sequence = waiter.sequence
        sequence.waiters.remove(waiter)  # or each would keep the other, and the rows, until memory is searched
        if sequence not in self._unfinished:
            return
        self._waiting -= not sequence.begun
        if not sequence.begun or not (sequence.waiters or sequence.running):
            self.metrics.dropped(reason, 1)
        if not sequence.waiters:
            sequence.left = reason
            if sequence.running:
                for run in self._running.values():
                    run.goes_on = False
            else:
                self._schedules[waiter.job.variant].remove(sequence)
                self._forget(sequence)
        self._wake()

    def _forget(self, sequence: Sequence) -> None:
        self._unfinished.discard(sequence)
        key = sequence.job.variant, tuple(sequence.job.ids)
        if self._same.get(key) is sequence:
            del self._same[key]

    def _wake(self) -> None:
        """Look for a batch once this turn of the event loop is over, and all that came in it is there."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._guarded, self._pump)

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """A step that no caller waits for; one that fails, a defect of ours, ends the service and all that wait."""
        try:
            step(*arguments)
        except Exception as error:
            self._broken = True
            self._drained.set()
            self._waiting = 0
            for sequence in self._unfinished:
                for waiter in sequence.waiters:
                    waiter.fail(error)
            for run in self._running.values():
                run.goes_on = False
            self._unfinished.clear()  # nothing of the schedules, whose state is unknown, is touched again
            raise

    def _pump(self) -> None:
        self._pumping = False
        while not self._broken and self._free and (batch := self._next_batch()):
            self._run_batch(batch, self._is_wide(batch))
        self._look_after_lanes()
        if not (self._open or self._unfinished):
            self._drained.set()

    def _look_after_lanes(self) -> None:
        """Those that go on by themselves stop where others wait, and where all cores have become free for one."""
        waits = any(self._schedules.values())
        for run in self._running.values():
            narrow = len(self._running) == 1 and not run.wide and run.variant.faster_wide(run.tokens)
            run.goes_on = run.goes_on and not (waits or narrow)

    @property
    def _free(self) -> int:
        """Lanes that are."""
        return 0 if any(run.wide for run in self._running.values()) else self._lanes - len(self._running)

    def _next_batch(self) -> Batch:
        """The next one of the variant whose turn it is; empty where nothing can be computed now."""
        for variant in [variant for variant, schedule in self._schedules.items() if schedule]:
            schedule = self._schedules[variant]
            if self._runs_small(variant) and schedule.joins:
                continue  # once that one is over
            others = sum(each.able for each in self._schedules.values() if each is not schedule)
            if batch := schedule.next_batch(max(1, self._free - others)):
                self._schedules[variant] = self._schedules.pop(variant)  # at the end: the other variants come first
                for sequence, _ in batch:
                    self._begin(sequence)
                return batch
        return []

    def _runs_small(self, variant: Variant) -> bool:
        return any(run.variant is variant and run.tokens <= LANE_TOKENS for run in self._running.values())

    def _begin(self, sequence: Sequence) -> None:
        sequence.running = True
        if not sequence.begun:
            sequence.begun = True
            self._waiting -= len(sequence.waiters)
            self.metrics.began(sequence.job.variant.name, sequence.cached)

    def _is_wide(self, batch: Batch) -> bool:
        variant = batch[0][0].job.variant
        if self._running or any(schedule.able for schedule in self._schedules.values()):
            return False
        return variant.faster_wide(_tokens(batch))

    def _run_batch(self, batch: Batch, wide: bool) -> None:
        schedule = self._schedules[batch[0][0].job.variant]
        loop = asyncio.get_running_loop()
        self._batches += 1
        number = self._batches
        run = _Run(batch[0][0].job.variant, _tokens(batch), wide, all(sequence.prefilled for sequence, _ in batch))
        self._running[number] = run

        def in_a_lane() -> None:
            step, steps = batch, 0
            while step:
                computed = _compute(step, schedule, wide)
                # A loop that is too busy to have taken in the step before this one is not left further behind.
                following = _next_step(step, computed) if run.goes_on and run.taken == steps else []
                handle = self._went_on if following else self._ended
                loop.call_soon_threadsafe(self._guarded, handle, number, step, schedule, computed)
                step, steps = following, steps + 1

        self._threads.submit(in_a_lane)
        if schedule.cache:
            self._populate(schedule.cache)

    def _populate(self, cache: PrefixCache) -> None:
        if slots := cache.ahead():
            self._memory.submit(cache.populate, slots)

    def _went_on(self, number: int, batch: Batch, schedule: Schedule, computed: Computed) -> None:
        """A lane has computed a token of each, and computes the next already."""
        if self._broken:
            return
        start, answers, end = computed
        run = self._running[number]
        run.taken += 1
        self._count(batch, end - start, run)
        for (sequence, piece), answer in zip(batch, answers, strict=True):
            assert isinstance(answer, int)
            schedule.computed(sequence, piece)
            sequence.ids.append(answer)

    def _ended(self, number: int, batch: Batch, schedule: Schedule, computed: Computed | Exception) -> None:
        run = self._running.pop(number)
        if self._broken:
            return
        if isinstance(computed, Exception):
            start, answers, end = 0.0, list[Answer]([computed] * len(batch)), 0.0
        else:
            start, answers, end = computed
            self._count(batch, end - start, run)
        for (sequence, piece), answer in zip(batch, answers, strict=True):
            sequence.running = False
            sequence.started = sequence.started or start
            if not isinstance(answer, Exception):
                schedule.computed(sequence, piece)
            self._after(sequence, schedule, answer, end)
        self._pump()  # now: those who wait for the answers write them while the lane computes

    def _count(self, batch: Batch, seconds: float, run: _Run) -> None:
        generated = sum(piece.rows for sequence, piece in batch if sequence.prefilled)
        padding = 0
        if not run.variant.cached:
            padding = sum(piece.rows for _, piece in batch) * max(len(piece.ids) for _, piece in batch) - run.tokens
        side_by_side = 1 if run.wide else self._lanes
        self._token_s += 0.1 * (seconds / run.tokens / side_by_side - self._token_s)
        self.metrics.computed(run.variant.name, len(batch), run.tokens - generated, generated, padding)

    def _after(self, sequence: Sequence, schedule: Schedule, answer: Answer, at: float) -> None:
        """What becomes of a sequence whose batch ended at `at`."""
        goes_on = not sequence.prefilled or (isinstance(answer, int) and sequence.may_go_on)
        if isinstance(answer, Exception) or not goes_on or sequence.left:
            schedule.end(sequence)
            self._forget(sequence)
            if goes_on and not isinstance(answer, Exception):
                self.metrics.dropped(sequence.left, 1)
        else:
            if sequence.prefilled and isinstance(answer, int):
                sequence.ids.append(answer)
            schedule.add(sequence)
        for waiter in sequence.waiters:
            if isinstance(answer, Exception):
                waiter.fail(answer)
                continue
            start = max(sequence.started, waiter.since)  # one that joined later waited for no lane
            row = answer if isinstance(answer, Row) else None
            done = Done(row, start - waiter.since, at - start, at, sequence.cached)
            if sequence.read:
                waiter.give(waiter.first, done)
            if not goes_on:
                waiter.give(waiter.result, done)


def _tokens(batch: Batch) -> int:
    """What it costs."""
    return sum(sequence.job.variant.tokens_of(piece) for sequence, piece in batch)


async def _in_time(waiters: list[Waiter]) -> None:
    """The rows of those without a reader, and the first one of any of the others, which take turns at the slots."""
    if reading := [waiter.first for waiter in waiters if waiter.job.reader]:
        await (reading[0] if len(reading) == 1 else asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED))
    if rows := [waiter.result for waiter in waiters if not waiter.job.reader]:
        await _all(rows)


async def _all(futures: list[asyncio.Future[Done]]) -> list[Done]:
    """As gather, which costs 20 us more for one."""
    return [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)


def _compute(batch: Batch, schedule: Schedule, wide: bool) -> Computed | Exception:
    """In a lane: when it began, what each sequence's rows are or its reader says of them, when it ended."""
    try:
        start = perf_counter()
        variant = batch[0][0].job.variant
        pieces = [piece for _, piece in batch]
        top_k = max(sequence.top_k for sequence, _ in batch)
        found = variant.compute(pieces, top_k, schedule.cache.pool if schedule.cache else None, wide)
        for piece, rows in zip(pieces, found, strict=True):
            if len(rows.logits) != piece.rows:
                raise ValueError(f"variant {variant.name!r} gives {len(rows.logits)} rows where {piece.rows} are asked")
        return (
            start,
            [_answer(sequence, rows) for (sequence, _), rows in zip(batch, found, strict=True)],
            perf_counter(),
        )
    except Exception as error:
        return error


def _next_step(batch: Batch, computed: Computed | Exception) -> Batch:
    """The tokens that its sequences gave, all of which generate; empty where one of them does not go on."""
    if isinstance(computed, Exception):
        return []
    following: Batch = []
    for (sequence, piece), answer in zip(batch, computed[1], strict=True):
        known = piece.past.size + len(piece.ids)
        if not (isinstance(answer, int) and piece.slots.size and known < sequence.job.tokens):
            return []
        # Its slots stay as they are from the end of its prompt to its own.
        slots = sequence.slots
        following.append((sequence, Piece([answer], slots[:known], slots[known : known + 1], 1)))
    return following


def _answer(sequence: Sequence, rows: Rows) -> Answer:
    reader = sequence.job.reader
    if reader is None:
        return rows.last if len(rows.logits) else None
    if not len(rows.logits):
        return None
    try:
        token = reader.read(rows.top(reader.top_k))
        return None if token is None else int(token)
    except Exception as error:
        return error
