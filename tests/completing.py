"""What the tests of /v1/completions share: a client, asking, reading a stream, and an engine that is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from service.app import create_app
from service.completions_schema import CompletionAnswer
from service.engine import Done, Rows
from service.settings import Settings

CONTEXT, V = 32, 300


def completions_client(bundles: Path) -> TestClient:
    """To be entered, which starts the engine."""
    limits = {"max_prompts": 16, "max_entries": 2_000, "max_body_bytes": 20_000}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    return TestClient(app, raise_server_exceptions=False)


def ask(client: TestClient, **body: object) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "gelu", "prompt": "if x is not", **body})
    assert response.status_code == 200, response.text
    CompletionAnswer.model_validate(response.json(), strict=True)
    return response.json()


def one(client: TestClient, **body: object) -> dict[str, Any]:
    (choice,) = ask(client, **body)["choices"]
    return choice


def events_of(text: str) -> list[Any]:
    """The contents of server-sent events; "[DONE]" as it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [d if d == "[DONE]" else json.loads(d) for d in (line.removeprefix("data: ") for line in lines)]


def streamed(client: TestClient, **body: object) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, without its end."""
    asked = {"model": "gelu", "prompt": "if x is not", "stream": True, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, end = events_of(response.text)
    assert end == "[DONE]"
    for chunk in chunks:
        CompletionAnswer.model_validate(chunk, strict=True)
    return chunks


def joined(chunks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the choices of chunks are together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part | {"text": "", "logprobs": part["logprobs"] and {}})
            assert whole["finish_reason"] is None or whole["text"] == "", "nothing comes after the last"
            whole["text"] += part["text"]
            for column, values in (part["logprobs"] or {}).items():
                whole["logprobs"][column] = whole["logprobs"].get(column, []) + values
            whole |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return [choices[index] for index in sorted(choices)]


# The engine as a script.


class Script:
    """An engine whose model says `tokens` whatever the prompt, each with all but certainty."""

    def __init__(self, tokens: Sequence[int], fails_after: int | None = None, error: Exception | None = None) -> None:
        self.tokens = tokens
        self.fails_after = fails_after
        self.error = error
        self.read = 0
        self.cancelled = asyncio.Event()

    async def run(self, jobs: Sequence[Any]) -> list[Done]:
        try:
            return [await self._run(job) for job in jobs]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _run(self, job: Any) -> Done:
        said = iter(self.tokens)
        wanted = len(job.ids) - job.reader.first
        token: int | None = await asyncio.to_thread(job.reader.read, rows_for([0] * (wanted - 1) + [next(said, 0)]))
        returned = 0
        while token is not None:
            self.read += 1
            if self.read == self.fails_after:
                if self.error is None:
                    await asyncio.Event().wait()  # until it is cancelled
                raise self.error
            returned += 1
            assert returned <= job.max_tokens
            token = await asyncio.to_thread(job.reader.read, rows_for([next(said, 0)]))
        return Done(None, 0.001, 0.002, 1.0, cached_tokens=2)


def rows_for(tokens: Sequence[int]) -> Rows:
    logits = np.zeros((len(tokens), V), np.float32)
    logits[np.arange(len(tokens)), list(tokens)] = 20
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    top_ids = np.argsort(-logits, axis=1, kind="stable")
    ones = np.ones((len(tokens), 2), np.float32)
    return Rows(logits, softmax, softmax, top_ids, ones, ones)
