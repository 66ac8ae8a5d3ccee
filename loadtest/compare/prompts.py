"""Where a comparison's prompts come from: built in, a file of them, a corpus cut to lengths, recorded traffic.

    texts or ids, read and checked line by line -> the server's own /tokenize -> a Workload that every arm can answer

Prompts are sent as token ids, so that every arm gets the same tokens and no tokenizer is in the latency; where the
arms have different tokenizers, or on request, as texts.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actuary import BadInput
from loadtest import plan
from loadtest.compare.arms import Arms
from loadtest.compare.workloads import FRESH_LETTERS, Cache, Prompt, Request, Workload

PROMPTS_CUT = 256  # from a corpus
CORPUS_BYTES = 1 << 20  # of it that are read: 300,000 tokens
PIECE_CHARACTERS = 1 << 15  # of one /tokenize, which takes 256 KB of UTF-8 at most
MOST_S = 1e10  # of recorded traffic: seconds since 1970 are among them
TRIES = 100  # of a length that must fit

_LENGTHS = re.compile(r"(?:fixed:(?P<fixed>\d+)|(?P<kind>uniform|lognormal):(?P<a>\d+(?:\.\d+)?)-(?P<b>\d+(?:\.\d+)?))")
_LENGTHS_ALLOWED = "fixed:64, uniform:8-256 or lognormal:64-32 (mean and standard deviation), in tokens"


@dataclass(frozen=True)
class Lengths:
    """A distribution of prompts' lengths in tokens."""

    written: str
    kind: str
    a: float
    b: float

    @classmethod
    def parse(cls, written: str) -> Lengths:
        """`fixed:N`, `uniform:LOW-HIGH` or `lognormal:MEAN-SD`."""
        match = _LENGTHS.fullmatch(written.strip())
        if not match:
            raise BadInput(f"--lengths {written!r} is no distribution; give {_LENGTHS_ALLOWED}")
        if match["fixed"]:
            kind, a, b = "fixed", float(match["fixed"]), float(match["fixed"])
        else:
            kind, a, b = match["kind"], float(match["a"]), float(match["b"])
        if a < 1 or (kind == "uniform" and (b < a or a % 1 or b % 1)):
            raise BadInput(
                f"--lengths {written!r}: a prompt has at least 1 token, and a range goes from few whole tokens to "
                f"many; give {_LENGTHS_ALLOWED}"
            )
        return cls(written, kind, a, b)

    def check(self, most: int) -> None:
        """BadInput where prompts of up to `most` tokens cannot have this distribution."""
        longest = self.a if self.kind == "lognormal" else self.b
        if longest > most:
            raise BadInput(f"--lengths {self.written}: {longest:g} tokens are more than {most}, {_MOST}")

    def draw(self, order: random.Random, most: int) -> int:
        """A length of 1 to `most`; what falls outside is drawn again, which shortens a tail."""
        if self.kind != "lognormal":
            return order.randint(int(self.a), int(self.b))
        variance = math.log1p((self.b / self.a) ** 2)
        mu, sigma = math.log(self.a) - variance / 2, math.sqrt(variance)
        for _ in range(TRIES):
            if 1 <= (length := round(order.lognormvariate(mu, sigma))) <= most:
                return length
        raise BadInput(f"--lengths {self.written}: hardly any length lies between 1 and {most}, {_MOST}")


_MOST = "what the arms' contexts leave room for; lower it, or --completions"


@dataclass(frozen=True)
class Source:
    """Prompts as they were read, not yet checked against any arm."""

    words: str
    requests: tuple[Request, ...]
    places: tuple[str, ...]  # where each was read, for errors


def built_in() -> Source:
    names = tuple(f"built-in prompt {number}" for number in range(1, len(plan.PROMPTS) + 1))
    return Source(f"{len(plan.PROMPTS)} built-in prompts", tuple(map(Request, plan.PROMPTS)), names)


def read_prompts(path: Path) -> Source:
    """One per line: text, or in `.jsonl` a text, ids, or {"prompt": either, "max_tokens": N}."""
    if path.suffix != ".jsonl":
        texts = plan.read_prompts(path)
        return Source(f"{len(texts)} prompts of {path}", tuple(map(Request, texts)), (str(path),) * len(texts))
    lines = [(where, _request(where, value, traffic=False)) for where, value in _json_lines(path, "prompts")]
    places, requests = zip(*lines, strict=True)
    return Source(f"{len(requests)} prompts of {path}", requests, places)


def read_traffic(path: Path) -> Source:
    """Recorded traffic: per line {"at_s": seconds, "prompt": text or ids, "max_tokens": N}, in order of time."""
    places: list[str] = []
    requests: list[Request] = []
    first_s = last_s = -math.inf
    for where, value in _json_lines(path, "traffic"):
        request = _request(where, value, traffic=True)
        assert request.at_s is not None
        if request.at_s < last_s:
            raise BadInput(
                f"{where}: at_s {request.at_s:g} is before the line above, {last_s:g}; sort the lines by time"
            )
        first_s, last_s = (request.at_s if not requests else first_s), request.at_s
        places.append(where)
        requests.append(replace(request, at_s=request.at_s - first_s))
    if len(requests) < 2:
        raise BadInput(f"traffic {path} holds one request, which has no timing to replay; record more of it")
    return Source(
        f"traffic of {path}, {len(requests)} requests in {last_s - first_s:g} s", tuple(requests), tuple(places)
    )


def _json_lines(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not empty; at least one."""
    try:
        # Not splitlines: U+2028 may stand inside of a JSON text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{what} {path} cannot be read as UTF-8 text: {error}") from error
    none = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            none = False
            where = f"{what} {path} line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadInput(f"{where} is not JSON: {error}") from error
    if none:
        raise BadInput(f"{what} {path} holds nothing; write one JSON document per line")


def _request(where: str, value: Any, *, traffic: bool) -> Request:
    known = {"prompt", "max_tokens"} | ({"at_s"} if traffic else set())
    if not isinstance(value, dict):
        if traffic:
            raise BadInput(f'{where}: expected {{"at_s": seconds, "prompt": ...}}')
        value = {"prompt": value}
    if more := sorted(set(value) - known):
        raise BadInput(f"{where}: unknown field {more[0]!r}; known: {', '.join(sorted(known))}")
    max_tokens = value.get("max_tokens", 0)
    if type(max_tokens) is not int or max_tokens < 0:
        raise BadInput(f"{where}: max_tokens must be a whole number from 0, not {max_tokens!r}")
    at_s = value.get("at_s")
    if traffic:
        if type(at_s) not in (int, float) or not 0 <= at_s <= MOST_S:
            raise BadInput(f"{where}: at_s must be a number of seconds from 0 to {MOST_S:g}, not {_short(at_s)}")
        at_s = float(at_s)
    return Request(_prompt(where, value.get("prompt")), max_tokens, at_s)


def _prompt(where: str, prompt: Any) -> Prompt:
    if isinstance(prompt, str) and prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where}: a lone surrogate is not text ({error})") from error
        return prompt
    if isinstance(prompt, list) and prompt and all(type(id_) is int and id_ >= 0 for id_ in prompt):
        return tuple(prompt)
    raise BadInput(f"{where}: prompt must be a text or a list of token ids, not empty; it is {_short(prompt)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def cut_corpus(path: Path, lengths: Lengths, arms: Arms, completions: int, seed: int) -> Source:
    """PROMPTS_CUT prompts of token ids, from random places of a text."""
    _check_one_tokenizer(arms)
    try:
        with path.open("rb") as file:
            text = file.read(CORPUS_BYTES).decode("utf-8", errors="ignore")  # the last character may be cut
    except OSError as error:
        raise BadInput(f"corpus {path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"corpus {path} holds no text")
    most = min(arms.contexts.values()) - completions
    lengths.check(most)
    pieces = (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))
    ids = [id_ for piece in pieces for id_ in arms.encode(piece, arms.tokenizers[0])]
    order = random.Random(seed)
    drawn = [lengths.draw(order, most) for _ in range(PROMPTS_CUT)]
    if max(drawn) > len(ids):
        raise BadInput(f"corpus {path} has {len(ids)} tokens, a prompt is to have {max(drawn)}; give a longer text")
    starts = [order.randint(0, len(ids) - length) for length in drawn]
    prompts = [tuple(ids[start : start + length]) for start, length in zip(starts, drawn, strict=True)]
    names = tuple(f"prompt {number} of the corpus" for number in range(PROMPTS_CUT))
    return Source(f"{PROMPTS_CUT} prompts of {path}, {lengths.written} tokens", tuple(map(Request, prompts)), names)


def make_workload(
    source: Source,
    arms: Arms,
    *,
    cache: Cache = "cold",
    completions: int = 0,
    texts: bool = False,
    top_k: int = 10,
    speed: float = 1.0,
) -> Workload:
    """What every arm can answer; BadInput names the prompt and the arm that cannot.

    Args:
        completions: tokens to generate where a request does not say how many; 0: the next token alone.
        texts: send texts, not their ids, although the arms may then see different tokens.
    """
    if not texts:
        _check_one_tokenizer(arms)
    requests, tokens = [], []
    for where, request in zip(source.places, source.requests, strict=True):
        request = replace(request, max_tokens=request.max_tokens or completions)
        ids = request.prompt
        if isinstance(ids, str):
            ids = _longest(where, ids, arms)
        elif texts:
            raise BadInput(f"{where}: --texts, but this prompt is token ids; give texts, or leave --texts out")
        _check(where, request, ids, arms, fresh=FRESH_LETTERS + 1 if texts and cache == "cold" else 0)
        tokens.append(len(ids))
        requests.append(request if texts else replace(request, prompt=ids))
    vocab_size = min(arms.vocab_sizes.values())
    return Workload(source.words, tuple(requests), vocab_size, cache, top_k, speed, tuple(tokens))


def _check_one_tokenizer(arms: Arms) -> None:
    if len(arms.tokenizers) > 1:
        raise BadInput(
            f"the arms have {len(arms.tokenizers)} different tokenizers ({', '.join(arms.tokenizers)} have one each), "
            "so that the same text is not the same work; compare variants of one tokenizer, or ask for --texts"
        )


def _longest(where: str, text: str, arms: Arms) -> tuple[int, ...]:
    """The ids of a text, by the tokenizer that makes the most of them."""
    ids = max((arms.encode(text, model) for model in arms.tokenizers), key=len)
    if not ids:
        raise BadInput(f"{where} is no token at all")
    return ids


def _check(where: str, request: Request, ids: Sequence[int], arms: Arms, fresh: int) -> None:
    """Refuse what an arm has no place or no row for; `fresh` tokens may be put before it."""
    for model, context in arms.contexts.items():
        needed = len(ids) + fresh + request.max_tokens
        if needed > context:
            more = f" and {request.max_tokens} to generate" if request.max_tokens else ""
            more += f" and up to {fresh} that make each text another" if fresh else ""
            raise BadInput(f"{where} has {len(ids)} tokens{more}, over the context of {model!r}, {context}; shorten it")
        if isinstance(request.prompt, tuple) and max(ids) >= arms.vocab_sizes[model]:
            raise BadInput(f"{where} holds the id {max(ids)}; {model!r} has 0 to {arms.vocab_sizes[model] - 1}")
