"""One request that an experiment answers: which arm it has, and what is written of it.

    expose -> around(the route's own work, on `engine`) -> ended ... record, rows

The route works on a request that names the arm. Beside it the engine is watched. What that saw is read later, with that
of other requests (service/experiments/live.py), so that no answer waits for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.completions_schema import CompletionRequest
from service.engine import Done, Job, Rows
from service.errors import STATUS, ApiError
from service.experiments.definition import Running
from service.experiments.records import Exposed
from service.schema import NextTokenRequest
from service.sequence import Reader, Runs

Logits = NDArray[np.float32]  # [V]


class Exposure:
    """Of a request for the experiment `running`, whose arm is `variant`."""

    __slots__ = ("_arrived", "_end", "_key", "_route", "choices", "engine", "generates", "id", "running", "streams",
                 "variant")  # fmt: skip

    def __init__(
        self,
        id_: str,
        running: Running,
        variant: str,
        key: bytes,
        asked: NextTokenRequest | CompletionRequest,
        route: str,
        arrived: float,
        engine: Runs,
        end: Callable[[Exposure, int, float], None],
    ) -> None:
        """`end` is told once, on the event loop, its status and when it ended, by perf_counter."""
        self.id = id_
        self.running = running
        self.variant = variant
        self.streams, self.choices, self.generates = False, 1, False
        if isinstance(asked, CompletionRequest):
            self.streams, self.choices, self.generates = asked.stream, asked.n, asked.max_tokens > 0
        self.engine = Watched(engine, self)
        self._key = key
        self._route = route
        self._arrived = arrived
        self._end: Callable[[Exposure, int, float], None] | None = end

    async def around(self, work: Awaitable[Response]) -> Response:
        """The route's response, with headers that say which arm it is; it has ended once it is there.

        What is streamed has ended when all of it is computed, by the engine that is watched.
        """
        try:
            response = await work
        except BaseException as error:
            if isinstance(error, ApiError):
                said = {name.decode(): value.decode() for name, value in self._headers}
                error.headers = {**(error.headers or {}), **said}
            self.ended(error)
            raise
        if not self.streams:
            self.ended()
        response.raw_headers.extend(self._headers)
        return response

    @property
    def _headers(self) -> tuple[tuple[bytes, bytes], ...]:
        name = self.running.definition.name
        return (b"x-experiment", name.encode()), (b"x-arm", self.variant.encode()), (b"x-exposure-id", self.id.encode())

    def ended(self, error: BaseException | None = None) -> None:
        """Now; unless it has before."""
        end, self._end = self._end, None
        if end:
            end(self, _status(error), perf_counter())

    def record(self, status: int, ended: float) -> Exposed:
        """What is written of it, once it has ended at `ended`."""
        engine = self.engine
        last = max(engine.done, key=lambda each: each.at, default=None)
        return Exposed(
            id=self.id,
            experiment_id=self.running.id,
            variant=self.variant,
            key_hash=self.running.assignment.key_hash(self._key) if self._key else None,
            at=time.time() - (perf_counter() - ended),
            route=self._route,
            status=status,
            prompt_tokens=sum(map(len, engine.prompts)),
            generated_tokens=sum(keeper.generated for keeper in engine.keepers),
            prepare_ms=1e3 * ((engine.began or ended) - self._arrived),
            queue_ms=1e3 * last.queue_s if last else 0.0,
            infer_ms=1e3 * last.infer_s if last else 0.0,
            total_ms=1e3 * (ended - self._arrived),
        )


def _status(error: BaseException | None) -> int:
    if error is None:
        return 200
    if isinstance(error, asyncio.CancelledError):
        return STATUS["client_gone"]
    return error.status_code if isinstance(error, HTTPException) else STATUS["internal"]


class Watched:
    """An engine for one request: what it was given, and what it did."""

    __slots__ = ("_engine", "_exposure", "_jobs", "began", "done", "keepers")

    def __init__(self, engine: Runs, exposure: Exposure) -> None:
        self._engine = engine
        self._exposure = exposure
        self._jobs: Collection[Job] = ()
        self.began = 0.0
        self.done: list[Done] = []
        self.keepers: list[_Keeper] = []

    @property
    def prompts(self) -> list[list[int]]:
        """Each once, however many choices it has."""
        return [job.ids for job in [*self._jobs][:: self._exposure.choices]]

    def rows(self) -> list[Logits]:
        """The logits after each prompt, as copies: a row is a part of its batch's, all of which it would hold."""
        found = [each.row.logits.copy() for each in self.done if each.row is not None]
        return found or [keeper.row for keeper in self.keepers if keeper.row is not None]

    async def run(self, jobs: Collection[Job]) -> list[Done]:
        self.began = perf_counter()
        self._jobs = jobs
        watched = [self._watched(at, job) if job.reader else job for at, job in enumerate(jobs)]
        try:
            self.done = await self._engine.run(watched)
        except BaseException as error:
            if self._exposure.streams:
                self._exposure.ended(error)
            raise
        if self._exposure.streams:
            self._exposure.ended()
        return self.done

    def _watched(self, at: int, job: Job) -> Job:
        assert job.reader
        first = at % self._exposure.choices == 0
        keeper = _Keeper(job.reader, len(job.ids), keeps=first, generates=self._exposure.generates)
        self.keepers.append(keeper)
        return dataclasses.replace(job, reader=keeper)


class _Keeper:
    """A reader that keeps the row after its prompt, and counts."""

    def __init__(self, reader: Reader, prompt_tokens: int, *, keeps: bool, generates: bool) -> None:
        self.first, self.top_k = reader.first, reader.top_k
        self._reader = reader
        self._left = prompt_tokens - reader.first  # rows of the prompt to come
        self._keeps = keeps
        self._generates = generates
        self.row: Logits | None = None
        self.generated = 0

    def read(self, rows: Rows) -> int | None:
        self._left -= len(rows.logits)
        if self._left <= 0:
            self.generated += self._generates
            if self._keeps and self.row is None:
                self.row = rows.logits[-1].copy()
        return self._reader.read(rows)
