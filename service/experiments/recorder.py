"""A bounded queue of records and the one thread that writes them, so that no answer waits for a database.

While the database is away, or another process has locked it, records wait, up to MOST_WAITING; one more is lost,
counted and said. At the end what waits is written, for as long as DRAIN_S where the database does not take it. A
process that is killed loses what it had not written, half a second's records.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from service.experiments.counters import Counters
from service.experiments.database import BUSY_S, Down
from service.experiments.records import Record
from service.experiments.store import Store

log = logging.getLogger("actuary.service")

EVERY_S = 0.5  # a batch costs 4 ms and 35 us a record of the interpreter's time
AT_ONCE = 500  # records of a transaction: 17 ms in SQLite
MOST_WAITING = 1 << 16  # 20 MB; ten minutes at 100 requests a second
RETRY_S = 5.0  # the longest pause between two attempts
DRAIN_S = float(BUSY_S)  # at the end, and as long again where an attempt has just begun


class Recorder:
    def __init__(self, store: Store, counters: Counters, tick: Callable[[], None]) -> None:
        """`tick` is called in the writing thread every EVERY_S while the database answers."""
        self._store = store
        self._counters = counters
        self._tick = tick
        self._waiting: deque[Record] = deque()
        self._batch: list[Record] = []  # what is being written, or whether it was is not known
        self._number = 0  # of that batch
        self._wanted = threading.Event()
        self._progress = threading.Condition()
        self._added = self._settled = 0  # settled: written, or lost once they waited
        self._lost = 0  # and not said yet
        self._down = ""
        self._ends: float | None = None  # when to give up, once it is closed
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        counters.waits(lambda: self._added - self._settled)
        self._thread.start()

    def add(self, record: Record) -> bool:
        """Have it written; False where too many wait, and it is lost. On the event loop, or a shadow's thread."""
        if self._added - self._settled >= MOST_WAITING:
            self._counters.lost()
            self._lost += 1
            return False
        self._waiting.append(record)
        self._added += 1
        return True

    def flush(self, timeout_s: float) -> None:
        """Have all written that was added before; Down where that takes longer, or the database is away."""
        if self._down:
            raise Down(self._down)
        wanted = self._added
        self._wanted.set()
        with self._progress:
            if not self._progress.wait_for(lambda: self._settled >= wanted, timeout_s):
                raise Down(self._down or f"it has not taken what waits within {timeout_s:g} s")

    def close(self) -> None:
        """Write what waits, and end."""
        self._ends = monotonic() + DRAIN_S
        self._wanted.set()
        self._thread.join(3 * DRAIN_S)
        if waiting := self._added - self._settled:
            self._counters.lost(waiting)
            log.error("%d experiment records are lost: %s", waiting, self._down or "the database is too slow")

    def _run(self) -> None:
        pause_s = EVERY_S
        while True:
            self._wanted.wait(pause_s)
            self._wanted.clear()
            try:
                while self._batch or self._waiting:
                    self._write()
                    self._up()
                self._tick()
                pause_s = EVERY_S
            except Down as error:
                self._counters.failed()
                if not self._down:
                    log.error("experiment records wait, up to %d: the database says: %s", MOST_WAITING, error)
                self._down = str(error)
                pause_s = min(RETRY_S, 2 * pause_s)
            except Exception:
                log.exception("the experiments' thread failed, and goes on")
            if self._ends is not None and (not (self._batch or self._waiting) or monotonic() > self._ends):
                return
            if self._ends is not None:
                pause_s = EVERY_S

    def _write(self) -> None:
        """A batch; after Down the very same again, by its number."""
        if not self._batch:
            self._batch = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            self._number += 1
        batch = self._batch
        try:
            late = self._store.write(batch, self._number)
        except Down:
            raise
        except Exception:  # a defect of ours: the same again would fail again, and hold up all others
            log.exception("%d experiment records are lost", len(batch))
            self._counters.lost(len(batch))
        else:
            self._counters.stored(len(batch) - late)
            if late:
                log.error("%d experiment records are lost: they are of experiments that ended a day ago or more", late)
                self._counters.lost(late)
        self._batch = []
        with self._progress:
            self._settled += len(batch)
            self._progress.notify_all()

    def _up(self) -> None:
        lost, self._lost = self._lost, 0
        if self._down or lost:
            log.error("the experiments' database answers; %d records were lost meanwhile", lost)
            self._down = ""
