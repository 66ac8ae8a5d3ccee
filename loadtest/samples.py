"""Raw samples, one per request, as `locustfile.py` writes them to CSV, and the rows that they sum up to.

Locust's own statistics round a latency above 100 ms to 10 ms and below it to 1 ms; these do not.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, get_type_hints

import numpy as np

from loadtest.plan import Plan

PERCENTILE_METHOD: Final = (
    "linear"  # of numpy.percentile: between the two nearest order statistics (Hyndman and Fan's 7)
)
SERVER_TIMES = ("queue", "tokenize", "infer", "total")
DIGITS = 4  # of every number in the file: 0.1 us in a latency, 0.1 ms in a time since the load began

# A plan is kept when at least this share of the planned requests left, and the rest left on time.
KEPT_SHARE = 0.99
LATE_BOUND_MS = 10.0  # p99 of the timer's lateness was 5.8 ms on two cores shared by five busy processes


class Sample(NamedTuple):
    """One request. Times in ms; NaN where the answer did not say."""

    worker: str  # which Locust worker sent it
    planned_s: float  # when it was to leave, since the load began on that worker
    at_s: float  # when it left; the same in a closed loop
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

    @property
    def corrected_ms(self) -> float:
        """From its planned time until its answer was read, so that a stall is paid by all who were due in it."""
        return self.latency_ms + self.late_ms


_KINDS = tuple(get_type_hints(Sample).values())


def write_header(file: TextIO) -> None:
    csv.writer(file).writerow(Sample._fields)


def write_samples(file: TextIO, samples: Iterable[Sequence[Any]]) -> None:
    """Appends and flushes, so that a run that is killed leaves what it measured."""
    rounded = ([round(cell, DIGITS) if isinstance(cell, float) else cell for cell in sample] for sample in samples)
    csv.writer(file).writerows(rounded)
    file.flush()


def parse_sample(cells: Sequence[str]) -> Sample | None:
    """None for a line that was torn by a kill."""
    if len(cells) != len(Sample._fields):
        return None
    try:
        return Sample(*(kind(cell) for kind, cell in zip(_KINDS, cells, strict=True)))
    except ValueError:
        return None


def read_samples(path: Path) -> list[Sample]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines, None)
        return [sample for cells in lines if (sample := parse_sample(cells)) is not None]


def in_window(samples: Iterable[Sample], plan: Plan, window_s: float) -> list[Sample]:
    """The samples whose planned time lies after the warm-up and inside the window."""
    # Rounded as the samples are: 0.1 + 0.2 is more than 0.3, and would take in the first request after it.
    begin, end = round(plan.warmup_s, DIGITS), round(plan.warmup_s + window_s, DIGITS)
    return [sample for sample in samples if begin <= sample.planned_s < end]


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("p50", "p90", "p99", "mean", "std", "min", "max"))
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method=PERCENTILE_METHOD)
    figures = {"p50": p50, "p90": p90, "p99": p99, "mean": values.mean(), "std": values.std()}
    figures |= {"min": values.min(), "max": values.max()}
    return {name: round(float(value), 4) for name, value in figures.items()}


def summarise(model: str, samples: Sequence[Sample], window_s: float) -> dict[str, Any]:
    """One row. Latencies are of the answers that went well; `requests` counts the failed ones too.

    `latency_ms` counts from the planned time, `uncorrected_ms` from when the request left. In a closed
    loop they are the same.
    """
    good = [sample for sample in samples if not sample.failure]
    reasons = Counter(sample.failure for sample in samples if sample.failure)
    return {
        "model": model,
        "requests": len(samples),
        "failures": len(samples) - len(good),
        "failure_reasons": dict(reasons.most_common()),
        "requests_per_s": round(len(good) / window_s, 3),
        "latency_ms": _spread(np.array([sample.corrected_ms for sample in good])),
        "uncorrected_ms": _spread(np.array([sample.latency_ms for sample in good])),
        "server_ms": {
            name: _spread(np.array([t for s in good if not math.isnan(t := getattr(s, f"{name}_ms"))]))
            for name in SERVER_TIMES
        },
    }


def too_slow(late_ms: Sequence[float]) -> str:
    """Why the client did not keep its plan; empty where it did. Of the requests that found a user free.

    As many may be late as may be missing, and one in any case, which of fifty is more than the share.
    """
    over = sum(late > LATE_BOUND_MS for late in late_ms)
    if over <= max(1, (1 - KEPT_SHARE) * len(late_ms)):
        return ""
    p99 = np.percentile(late_ms, 99, method=PERCENTILE_METHOD)
    return (
        "client too slow to keep the plan: with users free, p99 of the lateness was "
        f"{p99:.1f} ms (bound {LATE_BOUND_MS:g} ms)"
    )


def judge_client(
    samples: Sequence[Sample], plan: Plan, window_s: float, cpu_share: float | None, unanswered: int | None = None
) -> dict[str, Any]:
    """Whether the load that was planned is the load that was sent, and if not, whose fault it was.

    `unanswered` requests were sent and left no sample; None where Locust did not live to count them.
    """
    late = _spread(np.array([sample.late_ms for sample in samples]))
    timer_is_late = too_slow([sample.late_ms for sample in samples if not sample.starved])
    starved = sum(sample.starved for sample in samples)
    verdict: dict[str, Any] = {
        "mode": "closed loop" if plan.rate is None else "constant arrivals",
        "planned": None if plan.rate is None else round(plan.rate * window_s),
        "sent": len(samples),
        "unanswered": unanswered,
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
    if unanswered:
        verdict["said"].append(
            f"{unanswered} requests had neither an answer nor a timeout when the run was cut off; "
            "they are in none of these figures, which look better than they are"
        )
    if plan.rate is None:
        return verdict
    # One may fall outside at either end of the window, which of 30 is already more than the share.
    short = len(samples) < math.floor(KEPT_SHARE * verdict["planned"]) - 1
    often_starved = starved > (1 - KEPT_SHARE) * len(samples)
    if often_starved:
        verdict["said"].append(
            f"{starved} of {len(samples)} requests found all {plan.users} users waiting for an answer: "
            f"the server is too slow for {plan.rate:g}/s, and the wait is in the latencies; lower --rate or "
            "add --users"
        )
    if timer_is_late:
        verdict["said"].append(timer_is_late)
    if short:
        verdict["said"].append(f"{len(samples)} of {verdict['planned']} planned requests were sent in the window")
    verdict["kept_plan"] = not (short or timer_is_late or often_starved)
    return verdict
