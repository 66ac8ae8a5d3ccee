"""What requests a comparison sends: one small type that the driver writes to a JSON file and Locust's side reads.

    Request    a prompt, how many tokens to generate after it, and in recorded traffic when it came
    Workload   the requests, and whether the server may answer them from its cache
    Bodies     (model, number of a request) -> the path and the body to send

The service keeps keys and values of what it computed (service/prefix_cache.py): of a prompt that it had before it
computes the last token alone, and the cost of an activation is all but gone from the latency. So `cold` is the
default: the first tokens of each prompt are drawn anew each time it is sent, and no prefix of it is known. What is
sent keeps its length, and a server's cache works as it does for all traffic that does not repeat itself; turning it
off (`--cache-mb 0`) would measure something else, generation that computes its whole text again for each token.
`warm` sends the prompts as they are, once to each arm before anything is measured; of two that are the same and in
flight together the service then computes one.

`prompts.py` makes workloads from files.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from actuary import BadInput

Cache = Literal["cold", "warm"]
Prompt = str | tuple[int, ...]

# Drawn anew in each cold prompt. At V = 2048 two that are the same but for these would share all three once in 9e9.
FRESH_TOKENS = 3
FRESH_LETTERS = 6  # of a text: the same, and a space; no tokenizer makes more than 7 tokens of it
SCHEMA = 1

NEXT_TOKEN, COMPLETIONS = "/v1/next-token", "/v1/completions"


@dataclass(frozen=True)
class Request:
    prompt: Prompt  # a text, or the ids that every arm gets
    max_tokens: int = 0  # to generate, greedily and past any end; 0: the next token's probabilities instead
    at_s: float | None = None  # of recorded traffic: since its first request


@dataclass(frozen=True)
class Workload:
    """Every request already checked against the arms that get it."""

    source: str  # in words, for the report
    requests: tuple[Request, ...]
    vocab_size: int  # the smallest of the arms'
    cache: Cache = "cold"
    top_k: int = 10
    speed: float = 1.0  # of recorded traffic: 2 replays an hour in half of one
    tokens: tuple[int, ...] = ()  # of each prompt, by the first arm's tokenizer

    @property
    def traffic(self) -> bool:
        """Whether the requests bring their own times."""
        return self.requests[0].at_s is not None

    @property
    def streamed(self) -> bool:
        """Whether any is a completion."""
        return any(request.max_tokens for request in self.requests)

    @property
    def period_s(self) -> float:
        """How long the replay of recorded traffic takes, and a mean gap: then it begins again."""
        last_s = self.requests[-1].at_s
        assert last_s is not None
        return last_s / self.speed * (1 + 1 / max(1, len(self.requests) - 1)) or 1.0

    def due(self, begin_s: float, end_s: float) -> Iterator[tuple[float, int]]:
        """Recorded traffic's requests from `begin_s` to before `end_s` of its endless replay: (when, number)."""
        times = [(request.at_s or 0.0) / self.speed for request in self.requests]
        # From the turn before, and both ends compared alike: of windows side by side none loses a request to rounding.
        for turn in itertools.count(max(0, int(begin_s / self.period_s) - 1)):
            for number, inside_s in enumerate(times):
                when_s = turn * self.period_s + inside_s
                if when_s >= end_s:
                    return
                if when_s >= begin_s:
                    yield when_s, number

    def facts(self) -> dict[str, object]:
        """What run.json says of it."""
        facts: dict[str, object] = {
            "source": self.source,
            "requests": len(self.requests),
            "cache": self.cache,
            "sent_as": "ids" if all(isinstance(request.prompt, tuple) for request in self.requests) else "texts",
            "prompt_tokens": _spread(self.tokens),
            "generated_tokens": _spread([request.max_tokens for request in self.requests]),
        }
        return facts | ({"speed": self.speed, "period_s": self.period_s} if self.traffic else {})

    def write(self, path: Path) -> None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, ensure_ascii=False), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Workload:
        """What `write` wrote; BadInput for anything else."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("schema") != SCHEMA:
                raise BadInput(f"workload {path} was written by another version; start the comparison anew")
            requests = tuple(
                Request(**{**each, "prompt": prompt if isinstance(prompt := each["prompt"], str) else tuple(prompt)})
                for each in fields.pop("requests")
            )
            return cls(requests=requests, **{**fields, "tokens": tuple(fields["tokens"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"workload {path} cannot be read: {error}; start the comparison anew") from error


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    return (
        {"min": min(values), "mean": round(sum(values) / len(values), 2), "max": max(values)} if any(values) else None
    )


class Bodies:
    """The requests of a workload, ready to send to each model."""

    def __init__(self, workload: Workload, models: Sequence[str]) -> None:
        self._vocab_size, self._cold = workload.vocab_size, workload.cache == "cold"
        self._fresh = random.Random()  # of the system's entropy: nor may what an earlier run sent be in the cache
        self._paths = [COMPLETIONS if request.max_tokens else NEXT_TOKEN for request in workload.requests]
        self._prompts = [request.prompt for request in workload.requests]
        # The rest of each prompt, written once: 64 ids take 8 us, 1024 ids 130 us.
        self._rests = [_rest(prompt) for prompt in self._prompts]
        self._heads = {model: f'{{"model": {json.dumps(model)}, ' for model in models}
        self._tails = [_tail(request, workload.top_k) for request in workload.requests]

    def of(self, model: str, number: int) -> tuple[str, str]:
        """Path and body of one request; a cold prompt begins as none before."""
        prompt = self._prompts[number]
        if not self._cold:
            written = json.dumps(prompt)
        elif isinstance(prompt, str):
            letters = "".join(self._fresh.choices("abcdefghijklmnopqrstuvwxyz", k=FRESH_LETTERS))
            written = f'"{letters} {self._rests[number]}'
        else:
            fresh = [self._fresh.randrange(self._vocab_size) for _ in prompt[:FRESH_TOKENS]]
            written = f"[{', '.join(map(str, fresh))}{self._rests[number]}"
        return self._paths[number], f'{self._heads[model]}"prompt": {written}, {self._tails[number]}'


def _rest(prompt: Prompt) -> str:
    """What stands behind the tokens that are drawn anew, as JSON with its end."""
    if isinstance(prompt, str):
        return json.dumps(prompt)[1:]
    rest = prompt[FRESH_TOKENS:]
    return "".join(f", {id_}" for id_ in rest) + "]"


def _tail(request: Request, top_k: int) -> str:
    fields: dict[str, object] = {"top_k": top_k}
    if request.max_tokens:
        fields = {
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            # So that tokens are counted, not chunks: one may carry several, or none yet of a character's bytes.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    return json.dumps(fields)[1:]
