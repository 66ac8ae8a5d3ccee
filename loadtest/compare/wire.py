"""What goes between the driver and Locust as JSON: the workload one way, a list of cells per request the other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from loadtest.compare.workloads import Request, Workload

# The columns of store.SAMPLES that the process that sent the request knows.
ROW: Final = (
    "worker",
    "prompt",
    "planned_s",  # here of the visit; the driver moves both to the run's clock
    "at_s",
    "latency_ms",
    "late_ms",
    "starved",
    "queue_ms",
    "tokenize_ms",
    "infer_ms",
    "total_ms",
    "ttft_ms",
    "itl_ms",
    "tokens",
    "settling",
    "failure",
)
Row = list[Any]


def workload_told(workload: Workload) -> dict[str, Any]:
    return asdict(workload)


def workload_heard(told: dict[str, Any]) -> Workload:
    """Lists become tuples again."""
    fields = dict(told)
    requests = [
        Request(**{**each, "prompt": prompt if isinstance(prompt := each["prompt"], str) else tuple(prompt)})
        for each in fields.pop("requests")
    ]
    return Workload(requests=tuple(requests), **{**fields, "tokens": tuple(fields["tokens"])})
