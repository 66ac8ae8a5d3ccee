"""Refuses to measure engines that do not compute the same: each is asked the reference's prompts before any round.

In fp32, the same likeliest token, and each of the likeliest with the same probability in proportion. In int8, which
each engine rounds in its own way, the likeliest token among the ten and probabilities that resemble it.
"""

from __future__ import annotations

import json
import math
import statistics
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actuary import GateFailed
from loadtest.bench.servers import Server

FP32 = 1e-3  # of |ln p - ln reference|; float32 engines show 1e-5 here
# Mean of |ln p - ln reference|; int8 engines show 0.05 to 0.2 with these weights, and other weights 1.5.
INT8 = 0.5


@dataclass(frozen=True)
class Deviation:
    """|ln p - ln reference| over the tokens that are among the ten of both."""

    worst: float
    mean: float


def check(server: Server, reference: Path) -> Deviation:
    """GateFailed where the server's answers are not the reference's."""
    contender, deviations = server.contender, []
    for expected in json.loads(reference.read_text(encoding="utf-8")):
        answer = _ask(server, expected["ids"])
        shared = {id_: p for id_, p in zip(expected["top"], expected["probabilities"], strict=True) if id_ in answer}
        tokens, first = len(expected["ids"]), expected["top"][0]
        top = next(iter(answer))
        if first not in answer or (contender.precision == "fp32" and top != first):
            raise GateFailed(
                f"{contender.name} is not measured: after {tokens} tokens its likeliest token is {top}, "
                f"the reference's {first}; its model is not the one of gpt2/, or it is asked wrongly"
            )
        deviations += [abs(math.log(answer[id_] / p)) for id_, p in shared.items()]
    found = Deviation(max(deviations), statistics.mean(deviations))
    value, bound, what = (found.worst, FP32, "worst") if contender.precision == "fp32" else (found.mean, INT8, "mean")
    if not value <= bound:
        raise GateFailed(
            f"{contender.name} is not measured: its probabilities are off by {value:.2g} ({what} of |ln p - ln "
            f"reference|), {bound:g} is allowed; its model is not the one of gpt2/, or it is asked wrongly"
        )
    return found


def _ask(server: Server, ids: list[int]) -> dict[int, float]:
    """The likeliest tokens and their probabilities, in order."""
    body: dict[str, Any] = {"ids": ids}
    path = "/next"
    if server.contender.ours:
        path, body = "/v1/next-token", {"model": server.contender.models[0], "prompt": ids, "top_k": 10}
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            said = json.load(answer)
    except urllib.error.HTTPError as error:
        why = error.read(300).decode(errors="replace")
        raise GateFailed(f"{server.contender.name} is not measured: it answers {error.code}: {why}") from error
    if server.contender.ours:
        return {entry["id"]: entry["softmax"] for entry in said["results"][0]["top"]}
    return dict(zip(said["ids"], said["probabilities"], strict=True))
