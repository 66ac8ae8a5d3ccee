"""One answer as Locust hands it over -> what a sample keeps of it: the server's own times, and what went wrong."""

from __future__ import annotations

import math
from typing import Any, Final

from loadtest.samples import SERVER_TIMES

HEADERS: Final = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
# The event loop sleeps whole milliseconds, rounded up. Waking one early and yielding until the time has
# come brought the median lateness from 0.86 ms to 0.03 ms (60/s, two busy cores).
TIMER_STEP_S: Final = 0.001
NO_ANSWER_PAUSE_S: Final = 0.1  # a dead server refuses at once; without a pause a closed loop would count millions


def server_times(response: Any) -> dict[str, float]:
    """Of the response's headers; NaN where it has none."""
    headers = getattr(response, "headers", None) or {}
    return {f"{name}_ms": _milliseconds(headers.get(f"x-{name}-ms")) for name in SERVER_TIMES}


def _milliseconds(header: str | None) -> float:
    try:
        return float(header) if header is not None else math.nan
    except ValueError:
        return math.nan


def reason(response: Any, error: Exception, timeout_s: float) -> str:
    """Few distinct sentences, so that they can be counted: the status, or what went wrong without one."""
    status = getattr(response, "status_code", 0)
    if status and status != 200:
        try:
            said = response.json()["error"]
            # Our own mistake is worth its sentence; of an overloaded server the kind is enough.
            ours = 400 <= status < 500 and status not in (408, 429)
            return f"HTTP {status} {said['message' if ours else 'type']}"[:160]
        except (ValueError, KeyError, TypeError):
            return f"HTTP {status}"
    error = getattr(error, "original", None) or error  # geventhttpclient puts what happened into another
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return str(error)[:160] or type(error).__name__


def fail_if_wrong(response: Any, model: str) -> None:
    """Counts a 200 as failed where it is no answer to one prompt for `model`."""
    try:
        wrong = _wrong_shape(response.json(), model, response.headers.get("x-experiment"))
    except ValueError:
        wrong = "wrong answer: not JSON"
    if wrong:
        response.failure(wrong)


def _wrong_shape(answer: Any, model: str, experiment: str | None) -> str | None:
    """What is wrong with it; None where nothing is. Where an experiment was asked for, any variant may answer."""
    try:
        (result,) = answer["results"]
        if model not in (result["model"], experiment):
            return f"wrong answer: of {result['model']!r}, asked for {model!r}"
        if not isinstance(result["top"], list):
            return "wrong answer: top is not a list"
    except (KeyError, TypeError, ValueError):
        return "wrong answer: not one result with model and top"
    return None
