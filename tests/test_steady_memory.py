"""Resident memory over requests of mixed kind. `MIXED_REQUESTS=100000 pytest tests/test_steady_memory.py -s`."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import local

import httpx2 as httpx
import psutil
import pytest
from conftest import serving

N_REQUESTS = int(os.environ.get("MIXED_REQUESTS", "2000"))
CALLERS = 8
# What a request may leave for good, as a median over the later tenths. In 2,000 requests it is 300 to 800 bytes, since
# allocators still settle; were their answers kept, it would be 2,500.
LEFT_BYTES = 1_600
LONG_RUN, GROWTH = 100_000, 0.02  # promised of so many, after the first tenth
V, CONTEXT = 300, 32  # of the tiny bundles
# Few: a tokenizer remembers up to 10,000 words of 300 bytes each, which random letters would fill for 24,000 requests.
WORDS = [" if", " x", " is", " not", " é", "\n", " def", ":", "…"]


def ids(rng: random.Random, longest: int = 16) -> list[int]:
    return [rng.randrange(1, V) for _ in range(rng.randint(1, longest))]


def text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def completion(rng: random.Random, **more: object) -> dict:
    prompt = rng.choice([text(rng), ids(rng), [text(rng), text(rng)]])
    sampled = {"temperature": rng.choice([0, 1]), "seed": rng.randrange(9), "logprobs": rng.choice([None, 0, 5])}
    return {"model": "gelu", "prompt": prompt, "max_tokens": rng.randint(1, 12), **sampled, **more}


def streamed(http: httpx.Client, rng: random.Random) -> int:
    """To its end, or left after the first line."""
    left = rng.random() < 0.3
    with http.stream("POST", "/v1/completions", json=completion(rng, stream=True)) as response:
        lines = response.iter_lines()
        last = next(lines) if left else [line for line in lines if line][-1]
        assert left or last == "data: [DONE]"
    return response.status_code


def infer(rng: random.Random) -> dict:
    row = ids(rng)
    return {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, len(row)], "data": row}]}


def refused(http: httpx.Client, rng: random.Random) -> int:
    bad = [
        ("/v1/next-token", {"model": f"no-{rng.random()}", "prompt": "a"}),
        ("/v1/completions", {"model": "gelu", "prompt": [1] * (CONTEXT + 1)}),
        ("/v1/completions", {"model": "gelu", "prompt": "a", "max_tokens": -1, "stream": True}),
        ("/v1/score", {"model": "gelu", "query": 5}),
        ("/v2/models/gelu/infer", {"inputs": []}),
        (f"/v1/{rng.random()}", {}),
    ]
    path, body = rng.choice(bad)
    return http.post(path, json=body).status_code


# Kind of request, and the statuses that it may be answered with.
KINDS: dict[str, tuple[Callable[[httpx.Client, random.Random], int], set[int]]] = {
    "next-token": (
        lambda http, rng: (
            http.post(
                "/v1/next-token",
                json={"model": rng.choice(["gelu", "*"]), "prompt": [text(rng), text(rng)], "top_k": 20},
            ).status_code
        ),
        {200},
    ),
    "completions": (lambda http, rng: http.post("/v1/completions", json=completion(rng, n=2)).status_code, {200}),
    "echo": (
        lambda http, rng: (
            http.post("/v1/completions", json=completion(rng, echo=True, max_tokens=rng.randint(0, 2))).status_code
        ),
        {200},
    ),
    "streamed": (streamed, {200}),
    "score": (
        lambda http, rng: (
            http.post(
                "/v1/score",
                json={"model": "swiglu", "query": text(rng), "items": [text(rng)] * 3, "label_token_ids": [5, 6]},
            ).status_code
        ),
        {200},
    ),
    "tokenize": (lambda http, rng: http.post("/tokenize", json={"prompt": text(rng) * 50}).status_code, {200}),
    "infer": (lambda http, rng: http.post("/v2/models/gelu/infer", json=infer(rng)).status_code, {200}),
    "refused": (refused, {400, 404, 422}),
}


def test_resident_memory_is_flat_over_mixed_requests(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tenth fills allocators, thread pools and, at its least size, the cache of keys and values."""
    monkeypatch.setenv("ACTUARY_CACHE_MB", "1")
    callers, answered = local(), Counter()

    def ask(number: int) -> tuple[str, int]:
        if not hasattr(callers, "http"):
            callers.http = httpx.Client(base_url=url, timeout=60)
        rng = random.Random(number)
        kind = rng.choice(list(KINDS))
        status = KINDS[kind][0](callers.http, rng)
        assert status in KINDS[kind][1], (kind, number, status)
        return kind, status

    with serving(bundles) as (url, server), ThreadPoolExecutor(CALLERS) as pool:
        process, resident = psutil.Process(server.pid), []
        for tenth in range(10):
            numbers = range(tenth * N_REQUESTS // 10, (tenth + 1) * N_REQUESTS // 10)
            answered.update(pool.map(ask, numbers))
            resident.append(process.memory_info().rss)
        threads, files = process.num_threads(), process.num_fds()
    growth = resident[-1] / resident[0] - 1
    left = median(after - before for before, after in pairwise(resident[4:])) / (N_REQUESTS / 10)
    figures = f"{growth:.2%} of {[round(rss / 1e6, 1) for rss in resident]} MB, {left:.0f} bytes per request at last"
    print(figures, f"{threads} threads, {files} files", dict(answered))
    assert set(KINDS) == {kind for kind, _ in answered}
    assert left < LEFT_BYTES, figures
    assert growth < GROWTH or N_REQUESTS < LONG_RUN, figures
