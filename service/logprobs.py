"""Rows of logits to the `logprobs` of a completion.

A log-probability is the logit minus the logarithm of the row's summed exponentials. The graph computed that sum in its
softmax: at the highest logit, whose probability is at least 1 / V, it is logit - log(softmax) to float32's last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.engine import Rows
from service.vocabulary import Vocabulary

LEAST = -9999.0  # as vLLM; JSON has no infinity


@dataclass
class Entries:
    """Columns of `logprobs`, one entry per token."""

    text_offset: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def extend(self, others: Entries) -> None:
        self.tokens += others.tokens
        self.token_logprobs += others.token_logprobs
        self.top_logprobs += others.top_logprobs
        self.text_offset += others.text_offset

    def take(self, text_length: int, *, last: bool) -> Entries:
        """The first entries, out of these, whose place is known when `text_length` characters of the text are.

        What begins further on may yet be cut off with a stop string: it then has its place at the text's end, which
        it gets when this is the `last` time.
        """
        known = len(self) if last else sum(offset <= text_length for offset in self.text_offset)
        taken = Entries(
            [min(offset, text_length) for offset in self.text_offset[:known]],
            self.tokens[:known],
            self.token_logprobs[:known],
            self.top_logprobs[:known],
        )
        del self.text_offset[:known], self.tokens[:known], self.token_logprobs[:known], self.top_logprobs[:known]
        return taken


@dataclass(frozen=True)
class Listing:
    """What an entry lists: `top` likeliest tokens, the tokens `ids`, and the entry's own before these."""

    vocabulary: Vocabulary
    top: int
    ids: Sequence[int]
    as_ids: bool  # name tokens by their ids

    def name(self, id_: int) -> str:
        """A token's name in `tokens` and `top_logprobs`, as OpenAI has it."""
        text, bytes_ = self.vocabulary.text_of(id_)
        if self.as_ids or not text:  # an id of the model's that the tokenizer has not
            return f"token_id:{id_}"
        return text if bytes_ is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in bytes_)

    def entries(self, rows: Rows, which: slice, tokens: Sequence[int], offsets: Sequence[int]) -> Entries:
        """One entry for each of `tokens` [R], the next ones under those rows."""
        at = np.arange(len(tokens))
        logits, softmax = rows.logits[which], rows.softmax[which]
        best = logits.argmax(axis=1)
        shift = logits[at, best].astype(np.float64) - np.log(softmax[at, best].astype(np.float64))  # [R]
        extra = np.broadcast_to(np.array(self.ids, np.int64), (len(tokens), len(self.ids)))
        own = np.array(tokens, np.int64)[:, None]
        ids: NDArray[np.int64] = np.concatenate([own, rows.top_ids[which, : self.top], extra], axis=1)
        logprobs = np.maximum(np.take_along_axis(logits, ids, axis=1).astype(np.float64) - shift[:, None], LEAST)
        entries = Entries()
        for its_ids, its_logprobs, offset in zip(ids.tolist(), logprobs.tolist(), offsets, strict=True):
            top: dict[str, float] = {}
            for id_, logprob in dict(zip(its_ids, its_logprobs, strict=True)).items():
                name = self.name(id_)
                top[name if name not in top else f"token_id:{id_}"] = logprob
            entries.add(self.name(its_ids[0]), its_logprobs[0], top, offset)
        return entries
