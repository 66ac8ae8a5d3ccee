"""What is asked: the table of workloads, and the bodies of their requests, made from a seed.

Every contender of a round gets the same ids, and no two rounds share any: a cache may find again what a workload
repeats by its nature (a growing text, a common preamble) and nothing else.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["closed", "open", "typing", "preamble", "generate", "turns"]

PREAMBLE = 192  # tokens that every prompt of that workload begins with
TEXT = (32, 256)  # a typist's text when it is begun, and where the next one is begun
PROMPT_TO_GENERATE = 64
GENERATED = 64
BATCH = 8  # callers of the generation workload: a rival gets their prompts as one batch


@dataclass(frozen=True)
class Workload:
    """One cell's row."""

    name: str
    kind: Kind
    callers: int
    shortest: int = 0  # tokens of a prompt; for `preamble` those after it
    longest: int = 0
    share: float = 0.0  # of `open`: arrivals, of the requests/s that the yardstick reached in a closed loop


CLOSED = (
    Workload("64 tokens, 1 caller", "closed", 1, 64, 64),
    Workload("64 tokens, 8 callers", "closed", 8, 64, 64),
    Workload("64 tokens, 32 callers", "closed", 32, 64, 64),
    Workload("16 tokens, 8 callers", "closed", 8, 16, 16),
    Workload("256 tokens, 8 callers", "closed", 8, 256, 256),
    Workload("8 to 256 tokens, 32 callers", "closed", 32, 8, 256),
)
REUSE = (
    Workload("typing, 4 typists", "typing", 4),
    Workload("shared preamble, 8 callers", "preamble", 8, 16, 64),
)
OPEN = (
    Workload("arrivals every engine can serve", "open", 64, 64, 64, share=0.6),  # of the slowest engine
    Workload("arrivals near the best rival's limit", "open", 64, 64, 64, share=0.75),  # of the precision's best rival
)
GENERATE = (Workload("64 generated tokens, 8 callers", "generate", BATCH, PROMPT_TO_GENERATE, PROMPT_TO_GENERATE),)
TURNS = (
    Workload("one variant at a time", "turns", 8, 64, 64),
    Workload("six variants in turn", "turns", 8, 64, 64),
)
BASIS = CLOSED[1]  # whose requests/s the rates of the open loop are shares of
ALL = (*CLOSED, *REUSE, *OPEN, *GENERATE, *TURNS)


@dataclass(frozen=True)
class Door:
    """How a contender is asked."""

    ours: bool
    models: tuple[str, ...] = ()  # taken in turn

    def next_token(self, ids: str, turn: int) -> tuple[str, bytes]:
        """(path, body) for ids that are already written with commas."""
        if not self.ours:
            return "/next", f'{{"ids":[{ids}]}}'.encode()
        model = self.models[turn % len(self.models)]
        return "/v1/next-token", f'{{"model":"{model}","prompt":[{ids}],"top_k":10}}'.encode()

    def generate(self, prompts: list[str], turn: int) -> tuple[str, bytes]:
        if not self.ours:
            several = "],[".join(prompts)
            return "/generate", f'{{"prompts":[[{several}]],"tokens":{GENERATED}}}'.encode()
        model, (ids,) = self.models[turn % len(self.models)], prompts
        asked = f'"max_tokens":{GENERATED},"temperature":0,"ignore_eos":true'
        return "/v1/completions", f'{{"model":"{model}","prompt":[{ids}],{asked}}}'.encode()


def bodies(workload: Workload, door: Door, caller: int, vocab_size: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """One caller's requests without end, (path, body) each."""
    draw = random.Random(f"{seed} {workload.name} {caller}")
    words = [str(id_) for id_ in range(vocab_size)]
    # The same for all callers of the round.
    preamble = ",".join(random.Random(f"{seed} preamble").choices(words, k=PREAMBLE))
    for turn in itertools.count(caller):
        if workload.kind == "typing":
            text = draw.choices(words, k=TEXT[0])
            while len(text) <= TEXT[1]:
                yield door.next_token(",".join(text), turn)
                text += draw.choices(words, k=draw.randint(1, 2))
            continue
        if workload.kind == "generate":
            together = 1 if door.ours else BATCH
            yield door.generate([",".join(draw.choices(words, k=workload.longest)) for _ in range(together)], turn)
            continue
        ids = ",".join(draw.choices(words, k=draw.randint(workload.shortest, workload.longest)))
        yield door.next_token(f"{preamble},{ids}" if workload.kind == "preamble" else ids, turn)
