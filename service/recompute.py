"""TEMPORARY, to be deleted at the merge: the coming engine's interface on today's engine, everything recomputed.

Every wanted row is a prompt of its own for today's engine; a generated token makes a longer prompt of all before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service import engine as today
from service.variant import Row, Variant


@dataclass(frozen=True)
class Rows:
    logits: NDArray[np.float32]  # [R, V]
    softmax: NDArray[np.float32]  # [R, V]
    sigmoid: NDArray[np.float32]  # [R, V]
    top_ids: NDArray[np.int64]  # [R, K]
    mass: NDArray[np.float32]  # [R, 2]
    entropy_bits: NDArray[np.float32]  # [R, 2]


class Reader(Protocol):
    @property
    def first(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    def read(self, rows: Rows) -> int | None: ...


@dataclass(frozen=True)
class Job:
    variant: Variant
    ids: list[int]
    top_k: int = 0
    reader: Reader | None = None
    max_tokens: int = 0


@dataclass(frozen=True)
class Done:
    row: Row | None
    queue_s: float
    infer_s: float
    at: float
    cached_tokens: int = 0


class Engine:
    def __init__(self, engine: today.Engine) -> None:
        self._engine = engine

    async def run(self, jobs: Sequence[Job]) -> list[Done]:
        self._engine._admit(len(jobs))
        return await asyncio.gather(*map(self._run, jobs))

    async def _run(self, job: Job) -> Done:
        reader = job.reader
        if reader is None:
            (done,) = await self._engine.run([today.Job(job.variant, job.ids, job.top_k)])
            return Done(done.row, done.queue_s, done.infer_s, done.at)
        ids, generated, first = list(job.ids), 0, reader.first
        queue_s = infer_s = 0.0
        while True:
            for start in range(first, len(ids), 64):
                ends = range(start + 1, min(start + 64, len(ids)) + 1)
                done_rows = await self._engine.run([today.Job(job.variant, ids[:end], reader.top_k) for end in ends])
                columns = ("logits", "softmax", "sigmoid", "top_ids", "mass", "entropy_bits")
                k = min(reader.top_k, job.variant.manifest.vocab_size)
                arrays = [
                    np.stack([getattr(d.row, c)[:k] if c == "top_ids" else getattr(d.row, c) for d in done_rows])
                    for c in columns
                ]
                queue_s, infer_s = queue_s + done_rows[0].queue_s, infer_s + done_rows[0].infer_s
                token = await asyncio.to_thread(reader.read, Rows(*arrays))
            if token is None:
                return Done(None, queue_s, infer_s, done_rows[-1].at)
            generated += 1
            assert generated <= job.max_tokens, "the reader returns more tokens than it said"
            assert len(ids) < job.variant.manifest.context
            ids.append(token)
            first = len(ids) - 1
