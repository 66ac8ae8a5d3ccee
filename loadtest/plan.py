"""What to send: the variants of a server, the prompts, and the order in which both take turns.

Read by `cli.py` before a run and by `locustfile.py` on every Locust node.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actuary import BadInput

DEFAULT_URL = "http://127.0.0.1:8000"

# Python, as the default corpus is, from one token to about forty.
PROMPTS = (
    "if x is not",
    "import",
    "for i in range(len(",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n        self.next =",
    "def read_lines(path, encoding='utf-8'):\n    with open(path, encoding=encoding) as",
    "try:\n    return self._cache[key]\nexcept KeyError:\n    value = self.make(key)\n    self._cache[key]",
    "    raise ValueError(f'expected a positive number, got",
    "from collections import Counter\n\ncounts = Counter()\nfor word in text.split():\n    counts[word]",
)


@dataclass(frozen=True)
class Plan:
    """One run of load, with every number already checked."""

    url: str
    models: tuple[str, ...]
    users: int
    rate: float | None  # planned arrivals per second, of all variants together; None is a closed loop
    duration_s: float
    warmup_s: float
    prompts: tuple[str, ...]
    top_k: int
    seed: int
    timeout_s: float


def positive(text: str) -> float:
    """A finite number above zero, or ValueError; click's own range lets NaN through."""
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{text} is not a finite number above 0")
    return number


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line: text, or in `.jsonl` a string or an object with `prompt`. Skips empty lines."""
    try:
        # Not splitlines: a form feed or U+2028 belongs to the prompt. read_text makes \r\n and \r a \n.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts {path} cannot be read as UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _prompt_of_json(path, number, line) if path.suffix == ".jsonl" else line
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"prompts {path} line {number}: a lone surrogate is not text ({error})") from error
        prompts.append(prompt)
    if not prompts:
        raise BadInput(f"prompts {path} holds no prompt; write one per line")
    return tuple(prompts)


def _prompt_of_json(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"prompts {path} line {number} is not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise BadInput(f"prompts {path} line {number}: expected text, or an object with text as its `prompt`")
    return prompt


def check_url(url: str) -> str:
    """`url` without its trailing slash, or BadInput."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise BadInput(f"{url!r} is not the address of a server; give one like {DEFAULT_URL}")
    return url.rstrip("/")


def served_models(url: str, timeout_s: float = 10.0) -> dict[str, dict[str, object]]:
    """The entries of GET /v1/models by id, experiments among them. No proxy: Locust's client uses none either."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/v1/models", timeout=timeout_s) as response:
            listed = json.load(response)
            models = {entry["id"]: entry for entry in [*listed["data"], *listed.get("experiments", [])]}
    except urllib.error.HTTPError as error:
        raise BadInput(f"{url}/v1/models answered {error.code}; is it Actuary that runs there?") from error
    except (OSError, urllib.error.URLError) as error:
        why = getattr(error, "reason", error)
        raise BadInput(
            f"no server answers at {url} ({why}); start one with `actuary serve`, or name it with --url"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{url}/v1/models did not answer a list of models; is it Actuary that runs there?") from error
    if not models:
        raise BadInput(f"the server at {url} serves no variant; export one with `actuary export`")
    return models


def choose_models(asked: str | None, served: Mapping[str, Mapping[str, object]]) -> tuple[str, ...]:
    """The comma-separated names of `asked`, each of which must be served; all variants that are where None."""
    if asked is None:
        return tuple(name for name, entry in served.items() if entry.get("object") != "experiment")
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in served:
            near = difflib.get_close_matches(name, served, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"unknown variant {name!r}; served: {', '.join(served)}{hint}")
        if names.count(name) > 1:
            raise BadInput(f"variant {name!r} is named twice in --models")
    return tuple(names)


def turns(models: Sequence[str], prompts: Sequence[str], seed: int) -> Iterator[tuple[str, int]]:
    """Endless (model, prompt index): each round sends one prompt to every model once, in a shuffled order.

    So at any moment the counts of two models differ by at most one, and all of them saw the same prompts.
    """
    order = random.Random(seed)
    deck: list[int] = []
    while True:
        if not deck:
            deck = order.sample(range(len(prompts)), len(prompts))
        prompt = deck.pop()
        for model in order.sample(models, len(models)):
            yield model, prompt
