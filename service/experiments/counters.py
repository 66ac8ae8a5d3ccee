"""What /metrics says of experiments; no label is a caller's word."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge


class Counters:
    def __init__(self) -> None:
        self._records = Counter(
            "actuary_experiment_records",
            "Exposures, outcomes and shadows: stored, or lost since the database was away for too long.",
            ["fate"],
            registry=None,
        )
        self._shadows = Counter(
            "actuary_experiment_shadows",
            "Copies of the traffic: compared, or dropped: busy, where other requests were in work or too many waited; "
            "preempted, where one came; failed, as where its context is too short.",
            ["fate"],
            registry=None,
        )
        self._failures = Counter(
            "actuary_experiment_database_failures", "Writes that have to be tried again.", registry=None
        )
        self._waiting = Gauge("actuary_experiment_waiting_records", "Records that are not stored yet.", registry=None)
        self.all = (self._records, self._shadows, self._failures, self._waiting)
        for fate in ("stored", "lost"):
            self._records.labels(fate)  # 0 until it happens
        for fate in ("compared", "busy", "preempted", "failed"):
            self._shadows.labels(fate)

    def waits(self, how_many: Callable[[], int]) -> None:
        self._waiting.set_function(how_many)

    def stored(self, records: int) -> None:
        self._records.labels("stored").inc(records)

    def lost(self, records: int = 1) -> None:
        self._records.labels("lost").inc(records)

    def failed(self) -> None:
        self._failures.inc()

    def shadow(self, fate: str) -> None:
        self._shadows.labels(fate).inc()
