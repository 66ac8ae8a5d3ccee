"""Raw samples, one per request, as `locustfile.py` writes them to CSV, and the rows that they sum up to.

Locust's own statistics round a latency above 100 ms to 10 ms and below it to 1 ms; these do not.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

import numpy as np

from loadtest.plan import Plan

PERCENTILE_METHOD: Final = (
    "linear"  # of numpy.percentile: between the two nearest order statistics (Hyndman and Fan's 7)
)
SERVER_TIMES = ("queue", "tokenize", "infer", "total")

# A plan is kept when at least this share of the planned requests left, and the rest left on time.
KEPT_SHARE = 0.99
LATE_BOUND_MS = 10.0  # p99 of the timer's lateness was 5.8 ms on two cores shared by five busy processes


class Sample(NamedTuple):
    """One request. Times in ms; NaN where the answer did not say."""

    worker: str  # which Locust worker sent it
    at_s: float  # when it left, since the load began on that worker
    model: str
    prompt: int  # which of the prompts
    latency_ms: float  # from when it left until its answer was read whole
    late_ms: float  # from its planned time until it left; 0 in a closed loop
    starved: int  # 1: no user was free at its planned time, so the server's slowness made it late
    queue_ms: float
    tokenize_ms: float
    infer_ms: float
    total_ms: float
    failure: str  # empty where it went well


def write_header(file: TextIO) -> None:
    csv.writer(file).writerow(Sample._fields)


def write_samples(file: TextIO, samples: Iterable[Sequence[Any]]) -> None:
    """Appends and flushes, so that a run that is killed leaves what it measured."""
    rounded = ([round(cell, 4) if isinstance(cell, float) else cell for cell in sample] for sample in samples)
    csv.writer(file).writerows(rounded)
    file.flush()


def parse_sample(cells: Sequence[str]) -> Sample | None:
    """None for a line that was torn by a kill."""
    if len(cells) != len(Sample._fields):
        return None
    try:
        numbers = [float(cells[i]) for i in (1, 4, 5, 7, 8, 9, 10)]
        at_s, latency, late, queue, tokenize, infer, total = numbers
        return Sample(
            cells[0],
            at_s,
            cells[2],
            int(cells[3]),
            latency,
            late,
            int(cells[6]),
            queue,
            tokenize,
            infer,
            total,
            cells[11],
        )
    except ValueError:
        return None


def read_samples(path: Path) -> list[Sample]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines, None)
        return [sample for cells in lines if (sample := parse_sample(cells)) is not None]


def in_window(samples: Iterable[Sample], plan: Plan, window_s: float) -> list[Sample]:
    """The samples whose planned time lies after the warm-up and inside the window."""
    begin, end = plan.warmup_s, plan.warmup_s + window_s
    return [sample for sample in samples if begin <= sample.at_s - sample.late_ms / 1000 < end]


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("p50", "p90", "p99", "mean", "std", "min", "max"))
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method=PERCENTILE_METHOD)
    figures = {"p50": p50, "p90": p90, "p99": p99, "mean": values.mean(), "std": values.std()}
    figures |= {"min": values.min(), "max": values.max()}
    return {name: round(float(value), 4) for name, value in figures.items()}


def summarise(model: str, samples: Sequence[Sample], window_s: float) -> dict[str, Any]:
    """One row. Latencies are of the answers that went well; `requests` counts the failed ones too.

    `latency_ms` counts from the planned time, so that a stall is paid by all who were due in it;
    `uncorrected_ms` from when the request left. In a closed loop they are the same.
    """
    good = [sample for sample in samples if not sample.failure]
    reasons = Counter(sample.failure for sample in samples if sample.failure)
    uncorrected = np.array([sample.latency_ms for sample in good])
    late = np.array([sample.late_ms for sample in good])
    return {
        "model": model,
        "requests": len(samples),
        "failures": len(samples) - len(good),
        "failure_reasons": dict(reasons.most_common()),
        "requests_per_s": round(len(good) / window_s, 3),
        "latency_ms": _spread(uncorrected + late),
        "uncorrected_ms": _spread(uncorrected),
        "server_ms": {
            name: _spread(np.array([t for s in good if not math.isnan(t := getattr(s, f"{name}_ms"))]))
            for name in SERVER_TIMES
        },
    }


def judge_client(samples: Sequence[Sample], plan: Plan, window_s: float, cpu_share: float | None) -> dict[str, Any]:
    """Whether the load that was planned is the load that was sent, and if not, whose fault it was."""
    late = _spread(np.array([sample.late_ms for sample in samples]))
    timer_late = _spread(np.array([sample.late_ms for sample in samples if not sample.starved]))
    starved = sum(sample.starved for sample in samples)
    verdict: dict[str, Any] = {
        "mode": "closed loop" if plan.rate is None else "constant arrivals",
        "planned": None if plan.rate is None else round(plan.rate * window_s),
        "sent": len(samples),
        "late_ms": late,
        "starved": starved,
        "cpu_share": None if cpu_share is None else round(cpu_share, 3),
        "kept_plan": None,
        "said": [],
    }
    if cpu_share is not None and cpu_share > 0.9:
        verdict["said"].append(
            f"the load generator used {cpu_share:.0%} of a core: its own latency is in these figures; "
            "lower the load or spread it with locust --master and --worker"
        )
    if plan.rate is None:
        return verdict
    short = len(samples) < KEPT_SHARE * plan.rate * window_s
    timer_is_late = (timer_late["p99"] or 0.0) > LATE_BOUND_MS
    if starved > (1 - KEPT_SHARE) * max(len(samples), 1):
        verdict["said"].append(
            f"{starved} of {len(samples)} requests found all {plan.users} users waiting for an answer: "
            f"the server is too slow for {plan.rate:g}/s, and the wait is in the latencies; lower --rate or "
            "add --users"
        )
    if timer_is_late:
        verdict["said"].append(
            "client too slow to keep the plan: with users free, p99 of the lateness was "
            f"{timer_late['p99']:.1f} ms (bound {LATE_BOUND_MS:g} ms)"
        )
    if short:
        verdict["said"].append(f"{len(samples)} of {verdict['planned']} planned requests were sent in the window")
    verdict["kept_plan"] = not (short or timer_is_late or starved > (1 - KEPT_SHARE) * max(len(samples), 1))
    return verdict
