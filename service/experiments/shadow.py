"""A copy of the traffic to variants that never answer: what they would have said, and how long they took.

It goes to no lane of the engine but to a thread of its own, on one core, while the engine has nothing else to do; and
where a request comes meanwhile, it is broken off at the next operator of its graph. So no answer waits for it. What
does not find the engine idle is dropped and counted: shadows are a sample of the traffic, of its quiet moments.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export import bundle
from service.experiments.counters import Counters
from service.experiments.records import Shadowed
from service.variant import Variant

log = logging.getLogger("actuary.service")

MOST_WAITING = 4  # copies: by the time that more had their turn, they would find other requests


@dataclass(frozen=True)
class Copy:
    """The first prompt of an answered request, for one shadow."""

    exposure_id: str
    experiment_id: int
    variant: Variant
    against: str  # the variant that answered
    key_hash: int | None
    ids: list[int]
    logits: NDArray[np.float32]  # [V], what it answered
    infer_ms: float


class Shadows:
    """Its thread, from `start` to `close`."""

    def __init__(self, idle: Callable[[], bool], record: Callable[[Shadowed], object], counters: Counters) -> None:
        """`idle` says whether the engine has nothing to do."""
        self._idle = idle
        self._record = record
        self._counters = counters
        self._waiting = queue.Queue[Copy | None](MOST_WAITING + 1)  # None: no more will come
        self._run_options: Any = None  # of the copy that is computed
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread:
            self.give_way()
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def offer(self, copy: Copy) -> None:
        """Compute it if there is time."""
        if self._waiting.qsize() >= MOST_WAITING:
            self._counters.shadow("busy")
        else:
            self._waiting.put(copy)

    def give_way(self) -> None:
        """A request comes: break off what is computed."""
        if options := self._run_options:
            options.terminate = True

    def _run(self) -> None:
        while copy := self._waiting.get():
            try:
                self._counters.shadow(self._compare(copy))
            except Exception:
                log.exception("shadow %s failed", copy.variant.name)
                self._counters.shadow("failed")

    def _compare(self, copy: Copy) -> str:
        """What became of it."""
        if len(copy.ids) > copy.variant.context:
            return "failed"
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4  # a run that is broken off is no error
        self._run_options = options  # before asking: a request that comes from now on breaks it off
        try:
            if not self._idle():
                return "busy"
            feeds = {
                bundle.INPUT_IDS: np.array([copy.ids], np.int64),
                bundle.LENGTHS: np.array([len(copy.ids)]),
                bundle.TOP_K: np.array([0]),
            }
            start = perf_counter()
            [[logits]] = copy.variant.session.run([bundle.LOGITS], feeds, options)
            infer_ms = 1e3 * (perf_counter() - start)
        except Exception:
            if options.terminate:
                return "preempted"
            raise
        finally:
            self._run_options = None
        same_top, kl, sum_abs_dp = agreement(copy.logits, logits)
        self._record(
            Shadowed(
                copy.exposure_id,
                copy.experiment_id,
                copy.variant.name,
                copy.against,
                copy.key_hash,
                same_top,
                kl,
                sum_abs_dp,
                infer_ms,
                copy.infer_ms,
                time.time(),
            )
        )
        return "compared"


def agreement(real: NDArray[np.float32], shadow: NDArray[np.float32]) -> tuple[int, float, float]:
    """Logits [V] of both -> whether their likeliest token is the same, KL(real, shadow) in nats, sum |dp|."""
    log_p, log_q = _log_softmax(real), _log_softmax(shadow)
    p = np.exp(log_p)
    kl = float(np.dot(p, np.where(p > 0, log_p - log_q, 0)))
    return int(real.argmax() == shadow.argmax()), max(0.0, kl), float(np.abs(p - np.exp(log_q)).sum())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
