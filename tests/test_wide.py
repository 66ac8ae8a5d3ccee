"""How it is found out at the start whether a lone prompt had better take all cores: on a clock that the runs turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service import variant
from service.variant import WIDE_MOST_S, WIDE_S


class Clock:
    """Stands for a Variant too: a run of it takes `wide_ms` or `narrow_ms`, and longer until others are done."""

    def __init__(self, wide_ms: float, narrow_ms: float, busy_s: float = 0.0) -> None:
        self.now = 0.0
        self._ms = {True: wide_ms, False: narrow_ms}
        self._busy_s = busy_s
        self._runs = 0

    def run(self, prompts: Any, top_k: int, wide: bool) -> None:
        self._runs += 1
        # Two cores find a free moment of both in one run of ten.
        delayed = wide and self.now < self._busy_s and self._runs % 20 != 1
        self.now += self._ms[wide] / 1000 + 0.006 * delayed

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("clock", "faster", "least_s", "most_s"),
    [
        (Clock(4.4, 6.0), True, WIDE_S, 2 * WIDE_S),
        (Clock(1.3, 1.2), False, WIDE_S, 2 * WIDE_S),
        (Clock(5.9, 6.0), False, WIDE_S, 2 * WIDE_S),  # not worth a second session
        (Clock(4.4, 6.0, busy_s=0.3), True, 0.3, WIDE_MOST_S),
        (Clock(4.4, 6.0, busy_s=9.0), False, WIDE_MOST_S, 1.1 * WIDE_MOST_S),
    ],
    ids=["faster", "slower", "hardly faster", "others busy at first", "others always busy"],
)
def test_a_busy_moment_at_the_start_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, faster: bool, least_s: float, most_s: float
) -> None:
    monkeypatch.setattr(variant, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(variant, "sleep", clock.sleep)
    model: Any = SimpleNamespace(run=clock.run)
    assert variant._wide_is_faster(model, 64) is faster
    assert least_s <= clock.now <= most_s
