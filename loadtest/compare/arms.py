"""The variants that a comparison is between, as far as prompts go: what they take, and their server's tokenizers."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from statistics import median
from typing import Any

from actuary import ActuaryError, BadInput
from loadtest.compare.workloads import Bodies, Workload

TIMEOUT_S = 60.0
WARM_AT_ONCE = 32  # prompts of a request
TRIES = 5  # of which the middle one is believed: the first is a cold one


class Arms:
    """What the variants that are compared take, and their server's tokenizers."""

    def __init__(self, url: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """`facts`: the entries of /v1/models of the variants, by name."""
        self._url = url
        self.contexts = {model: int(entry["context"]) for model, entry in facts.items()}
        self.vocab_sizes = {model: int(entry["vocab_size"]) for model, entry in facts.items()}
        # One variant of each tokenizer; where the server does not say which it is, it is another.
        first: dict[str, str] = {}
        for model, entry in facts.items():
            first.setdefault(entry.get("files", {}).get("tokenizer.json", model), model)
        self.tokenizers = list(first.values())

    def encode(self, text: str, model: str) -> tuple[int, ...]:
        """With what the tokenizer puts around a prompt."""
        answer = self._ask("/tokenize", {"model": model, "prompt": text})
        try:
            return tuple(answer["tokens"])
        except (KeyError, TypeError) as error:
            raise BadInput(f"{self._url}/tokenize did not answer ids; is it Actuary that runs there?") from error

    def warm(self, workload: Workload) -> None:
        """Have every variant compute every prompt once, so that its cache has them."""
        prompts = [
            request.prompt if isinstance(request.prompt, str) else list(request.prompt) for request in workload.requests
        ]
        for model in self.contexts:
            for at in range(0, len(prompts), WARM_AT_ONCE):
                body = {"model": model, "prompt": prompts[at : at + WARM_AT_ONCE], "top_k": 0}
                try:
                    self._ask("/v1/next-token", body)
                except BadInput as error:
                    raise ActuaryError(f"while warming {model!r}: {error}") from error

    def answer_s(self, workload: Workload) -> float:
        """About how long an answer of the slowest variant takes, to a client that is alone."""
        bodies = Bodies(workload, list(self.contexts))
        slowest_s = 0.0
        for model in self.contexts:
            times = []
            for number in range(TRIES):
                path, body = bodies.of(model, number % len(workload.requests))
                began = time.perf_counter()
                self._post(path, body)
                times.append(time.perf_counter() - began)
            slowest_s = max(slowest_s, median(times))
        return slowest_s

    def _ask(self, path: str, body: object) -> Any:
        try:
            return json.loads(self._post(path, json.dumps(body)))
        except ValueError as error:
            raise BadInput(
                f"{self._url}{path} did not answer JSON ({error}); is it Actuary that runs there?"
            ) from error

    def _post(self, path: str, body: str) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as Locust's client: no proxy
        request = urllib.request.Request(self._url + path, body.encode(), {"content-type": "application/json"})
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise BadInput(f"{self._url}{path} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise BadInput(f"{self._url}{path} did not answer ({error}); is it Actuary that runs there?") from error
