"""Scenes for the engine without a model: a variant that stands still until it is told to go on, its log, its jobs."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from service.engine import Done, Engine, Job, Row, Rows
from service.prefix_cache import PrefixCache
from service.variant import Piece

LIMIT_S = 60  # a hang fails instead
CONTEXT = 1000
Log = list[tuple[str, list[list[int]], int]]


class Gated:
    """Stands for a Variant: notes each batch, computes it once the gate is open.

    A row's logits are the ids up to its token, the earlier ones as the pool has them. `log` holds what is computed.
    """

    context = CONTEXT
    pads = False

    def __init__(self, name: str, log: Log, wide: bool = False, cached: bool = False, row_bytes: int = 1) -> None:
        self.name, self.cached, self.row_bytes = name, cached, row_bytes
        self.gate = threading.Event()
        self.gate.set()
        self.ran_wide: list[bool] = []
        self._wide, self._log = wide, log

    def faster_wide(self, tokens: int) -> bool:
        return self._wide

    def tokens_of(self, piece: Piece) -> int:
        return len(piece.ids)

    def compute(self, pieces: Sequence[Piece], top_k: int, pool: np.ndarray, wide: bool) -> list[Rows]:
        self._log.append((self.name, [list(piece.ids) for piece in pieces], top_k))
        self.ran_wide.append(wide)
        assert self.gate.wait(LIMIT_S)
        found = []
        for piece in pieces:
            past = pool[0, piece.past, 0].astype(int).tolist() if piece.past.size else []
            if piece.slots.size:
                pool[0, piece.slots, 0] = piece.ids
            found.append(rows_of([*past, *piece.ids], piece.rows))
        return found


def rows_of(ids: list[int], rows: int) -> Rows:
    """As many of the last rows: -1 after a row's ids."""
    logits = np.full((rows, CONTEXT), -1.0, np.float32)
    for row, end in zip(logits, range(len(ids) - rows + 1, len(ids) + 1), strict=True):
        row[:end] = ids[:end]
    two = np.zeros((rows, 2), np.float32)
    return Rows(logits, logits, logits, np.zeros((rows, 1), np.int64), two, two)


def ids_of(row: Row | None) -> list[int]:
    assert row is not None
    return [int(id_) for id_ in row.logits if id_ >= 0]


class Counting:
    """A reader that gives 500, 501, ..., up to `most` of them, and keeps each row's ids."""

    top_k = 1

    def __init__(self, most: int, first: int = 0, tokens: int = 1) -> None:
        self.first, self._left, self._before = first, most, tokens - first
        self.seen: list[list[int]] = []

    def read(self, rows: Rows) -> int | None:
        self.seen += [[int(id_) for id_ in row if id_ >= 0] for row in rows.logits]
        self._left -= len(self.seen) >= self._before
        return 500 + len(self.seen) - self._before if self._left >= 0 else None


def play(scene: Callable[[Engine, Gated, Log], Awaitable[None]], slots: int = 0, **options: Any) -> None:
    """Run `scene` with an engine of `options` and a variant, which has a cache of so many slots."""
    log: Log = []
    variant = Gated("a", log, cached=bool(slots))

    async def with_engine() -> None:
        caches: Any = {variant: PrefixCache(1, slots, 1)} if slots else {}
        given = {"max_queue": 1000, "max_batch_tokens": 100, "timeout_s": LIMIT_S, "caches": caches}
        async with Engine(**{**given, **options}) as engine:
            await scene(engine, variant, log)
        for cache in caches.values():
            assert cache._held == 0
            assert cache.used == cache._stored

    asyncio.run(asyncio.wait_for(with_engine(), 2 * LIMIT_S))


async def start(engine: Engine, jobs: list[Job]) -> asyncio.Task[list[Done]]:
    """A running request, its jobs admitted."""
    task = asyncio.create_task(engine.run(jobs))
    await asyncio.sleep(0)
    return task


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def hold(engine: Engine, variant: Gated, log: Log) -> asyncio.Task[list[Done]]:
    """A request that the engine is computing, so that others have to wait until variant.gate opens."""
    variant.gate.clear()
    before = len(log)
    task = await start(engine, [job(variant, 1)])
    await until(lambda: len(log) > before)
    return task


_numbers = itertools.count(1000)


def job(variant: Any, length: int, top_k: int = 1, first: int | None = None) -> Job:
    """A prompt of its own; the same again where `first` is."""
    return Job(variant, [next(_numbers) if first is None else first, *range(1, length)], top_k)


def lengths_of(log: Log) -> list[list[int]]:
    return [[len(ids) for ids in batch] for _, batch, _ in log]
