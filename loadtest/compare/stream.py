"""Server-sent events of a completion -> time to the first token and mean time between tokens, to 0.1 ms.

Each line is stamped as it arrives and looked into only when the stream is over, so that other users' answers do not
wait for this one's JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DONE = b"[DONE]"


@dataclass(frozen=True)
class Stream:
    """Times in ms since the request left."""

    latency_ms: float  # until its last byte
    ttft_ms: float = math.nan
    itl_ms: float = math.nan  # of one token alone there is none
    tokens: int = 0
    failure: str = ""


def lines(readline: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """The data of each event; `readline(separator)` answers b"" at the end."""
    while line := readline(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def read_stream(events: Iterator[bytes], began: float, clock: Callable[[], float] = time.perf_counter) -> Stream:
    """Reads to the end.

    Args:
        began: when the request left, by `clock`.
    """
    arrived: list[tuple[float, bytes]] = []
    for data in events:
        arrived.append((clock(), data))
    latency_ms = (clock() - began) * 1000
    try:
        return _read(arrived, began, latency_ms)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return Stream(latency_ms, failure=f"wrong answer: an event that is no completion's ({type(error).__name__})")


def _read(arrived: list[tuple[float, bytes]], began: float, latency_ms: float) -> Stream:
    if not arrived or arrived[-1][1] != DONE:
        last: dict[str, Any] = json.loads(arrived[-1][1]) if arrived else {}
        said = last.get("error", {}).get("type", "cut off before [DONE]")
        return Stream(latency_ms, failure=f"stream: {said}"[:160])
    counted: list[tuple[float, int]] = []  # (when, tokens so far) of each chunk that brought some
    for when, data in arrived[:-1]:
        chunk = json.loads(data)
        if "error" in chunk:
            return Stream(latency_ms, failure=f"stream: {chunk['error']['type']}"[:160])
        if not chunk["choices"]:  # the usage alone, at the end
            continue
        tokens = chunk["usage"]["completion_tokens"]
        if tokens > (counted[-1][1] if counted else 0):
            counted.append((when, tokens))
    if not counted:
        return Stream(latency_ms, failure="wrong answer: no token generated")
    (first_s, first), (last_s, tokens) = counted[0], counted[-1]
    itl_ms = (last_s - first_s) * 1000 / (tokens - first) if tokens > first else math.nan
    return Stream(latency_ms, (first_s - began) * 1000, itl_ms, tokens)
