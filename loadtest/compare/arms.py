"""The variants that a comparison is between, as far as prompts go: what they take, and their server's tokenizers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from actuary import ActuaryError, BadInput
from loadtest.compare.workloads import Workload

TIMEOUT_S = 60.0
WARM_AT_ONCE = 32  # prompts of a request


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

    def _ask(self, path: str, body: object) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as Locust's client: no proxy
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise BadInput(f"{self._url}{path} answered {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{self._url}{path} did not answer JSON ({error}); is it Actuary that runs there?"
            ) from error
