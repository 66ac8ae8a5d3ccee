"""One request that an experiment answers: which arm it has, and what is written of it.

    expose -> around(the route's own work, on `engine`) -> record: Exposed, rows kept for its outcome, shadows

The route works on a request that names the arm. Beside it the engine is watched, for times, tokens and rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection
from time import perf_counter
from typing import Any, Generic, TypeVar

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

A = TypeVar("A", NextTokenRequest, CompletionRequest)
Logits = NDArray[np.float32]  # [V]


class Exposure(Generic[A]):
    """Of a request for the experiment `running`, whose arm is `variant`."""

    def __init__(
        self,
        id_: str,
        running: Running,
        variant: str,
        key_hash: int | None,
        asked: A,
        route: str,
        arrived: float,
        engine: Runs,
        record: Callable[[Exposure[A], Exposed], None],
    ) -> None:
        self.id = id_
        self.running = running
        self.variant = variant
        self.key_hash = key_hash
        completion = asked if isinstance(asked, CompletionRequest) else None
        self.asked: A = asked.model_copy(update={"model": variant if completion else [variant]})
        self.engine = Watched(engine, self)
        self.streams = completion is not None and completion.stream
        self.choices = completion.n if completion else 1
        self.generates = completion is not None and completion.max_tokens > 0
        self._route = route
        self._arrived = arrived
        self._record: Callable[[Exposure[A], Exposed], None] | None = record

    async def around(self, work: Awaitable[Response]) -> Response:
        """The route's response, with headers that say which arm it is; it is recorded once it is there.

        What is streamed is recorded when all of it is computed, by the engine that is watched.
        """
        try:
            response = await work
        except BaseException as error:
            if isinstance(error, ApiError):
                error.headers = {**(error.headers or {}), **dict(self._headers)}
            self.ended(error)
            raise
        if not self.streams:
            self.answered()
        response.raw_headers.extend((name.encode(), value.encode()) for name, value in self._headers)
        return response

    @property
    def _headers(self) -> tuple[tuple[str, str], ...]:
        name = self.running.definition.name
        return ("x-experiment", name), ("x-arm", self.variant), ("x-exposure-id", self.id)

    def answered(self) -> None:
        """Record it once this turn of the event loop is over, in which the answer is sent."""
        asyncio.get_running_loop().call_soon(self.ended, None, perf_counter())

    def ended(self, error: BaseException | None, at: float = 0.0) -> None:
        """Record that it ended `at`, now where that is not given; unless it is recorded."""
        record, self._record = self._record, None
        if record is None:
            return
        engine, at = self.engine, at or perf_counter()
        record(
            self,
            Exposed(
                id=self.id,
                experiment_id=self.running.id,
                variant=self.variant,
                key_hash=self.key_hash,
                at=time.time(),
                route=self._route,
                status=_status(error),
                prompt_tokens=engine.prompt_tokens,
                generated_tokens=sum(keeper.generated for keeper in engine.keepers),
                prepare_ms=1e3 * ((engine.began or at) - self._arrived),
                queue_ms=1e3 * engine.queue_s,
                infer_ms=1e3 * engine.infer_s,
                total_ms=1e3 * (at - self._arrived),
            ),
        )


def _status(error: BaseException | None) -> int:
    if error is None:
        return 200
    if isinstance(error, asyncio.CancelledError):
        return STATUS["client_gone"]
    return error.status_code if isinstance(error, HTTPException) else STATUS["internal"]


class Watched:
    """An engine for one request."""

    def __init__(self, engine: Runs, exposure: Exposure[Any]) -> None:
        self._engine = engine
        self._exposure = exposure
        self.began = self.queue_s = self.infer_s = 0.0
        self.prompts: list[list[int]] = []
        self.prompt_tokens = 0
        self.keepers: list[_Keeper] = []
        self._found: list[Logits] = []

    def take_rows(self) -> list[Logits]:
        """The logits after each prompt, as copies: a row is a part of its batch's, all of which it would hold."""
        found, self._found = self._found, []
        return [row.copy() for row in found] or [keeper.row for keeper in self.keepers if keeper.row is not None]

    async def run(self, jobs: Collection[Job]) -> list[Done]:
        self.began = perf_counter()
        n = self._exposure.choices
        watched = []
        for at, job in enumerate(jobs):
            if at % n == 0:
                self.prompts.append(job.ids)
                self.prompt_tokens += len(job.ids)
            if job.reader:
                keeper = _Keeper(job.reader, len(job.ids), keeps=at % n == 0, generates=self._exposure.generates)
                self.keepers.append(keeper)
                job = dataclasses.replace(job, reader=keeper)
            watched.append(job)
        try:
            done = await self._engine.run(watched)
        except BaseException as error:
            if self._exposure.streams:
                self._exposure.ended(error)
            raise
        last = max(done, key=lambda each: each.at)
        self.queue_s, self.infer_s = last.queue_s, last.infer_s
        self._found = [each.row.logits for each in done if each.row is not None]
        if self._exposure.streams:
            self._exposure.answered()
        return done


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
