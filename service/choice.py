"""One choice of a completion: the engine's reader, which turns each row to a token and its tokens to pieces of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.completions_schema import CompletionRequest
from service.detokenizer import Detokenizer
from service.engine import Rows
from service.errors import ApiError
from service.logprobs import Entries, Listing
from service.sampling import Sampler, Sampling
from service.stops import Stops
from service.variant import Variant


@dataclass(frozen=True)
class Prompt:
    index: int
    ids: list[int]
    given_as_ids: bool
    text: str  # of `echo`, else empty
    offsets: list[int]  # of each id in `text`; of `echo` with logprobs, else empty


@dataclass(frozen=True)
class Piece:
    """What a token adds to a choice."""

    text: str
    logprobs: Entries | None
    token_ids: list[int]
    generated: int  # tokens so far
    finish_reason: str | None = None  # the last piece has one
    stop_reason: str | int | None = None

    @property
    def listed(self) -> int:
        """How much of an answer it is, in entries."""
        tops = self.logprobs.top_logprobs if self.logprobs else ()
        return 1 + sum(len(top or ()) for top in tops)


class Choice:
    """One completion of one prompt: the engine's Reader, which puts out pieces."""

    def __init__(
        self,
        asked: CompletionRequest,
        sampling: Sampling,
        variant: Variant,
        prompt: Prompt,
        number: int,
        put: Callable[[Piece], None],
    ) -> None:
        vocabulary, last = variant.vocabulary, len(prompt.ids) - 1
        self.first = 0 if asked.echo and asked.lists_logprobs else last
        self.top_k = min(asked.logprobs or 0, variant.manifest.vocab_size)
        self._asked = asked
        self._variant = variant
        self._prompt = prompt
        self._put = put
        self._at = self.first  # of the next row, in prompt and answer
        self._generated = 0
        self._stops = Stops(asked.stop)
        # Without echo, what a prompt of ids leaves unfinished of a character comes with the token that finishes it.
        finish = asked.echo and prompt.given_as_ids
        self._detokenizer = Detokenizer(vocabulary, prompt.ids, finish=finish)
        self._hidden = vocabulary.special_ids if asked.skip_special_tokens else frozenset()
        self._ends = sampling.ends
        self._sampler = Sampler(
            sampling,
            variant.manifest.vocab_size,
            prompt.ids,
            np.random.default_rng(None if asked.seed is None else [asked.seed % (1 << 64), prompt.index, number]),
        )
        self._listing: Listing | None = None
        if asked.lists_logprobs:
            ids = asked.logprob_token_ids or ()
            self._listing = Listing(vocabulary, self.top_k, ids, asked.return_tokens_as_token_ids)
        self._entries = Entries()  # those that no piece has yet
        self._decoded = self._said = 0  # characters of the choice's text: known, and in a piece
        self._text = ""  # not in a piece yet
        if asked.echo:
            self._text, self._decoded = prompt.text, len(prompt.text)
            if self._listing:
                self._entries.add(self._listing.name(prompt.ids[0]), None, None, 0)

    def read(self, rows: Rows) -> int | None:
        """The next token; None where the choice is complete."""
        if not np.isfinite(rows.entropy_bits[:, 0]).all():
            raise ApiError("internal", f"variant {self._variant.name!r} gives no finite probabilities for this prompt")
        start, last = self._at, len(self._prompt.ids) - 1
        self._at += len(rows.logits)
        if start < last and self._listing:
            stop = min(self._at, last) + 1
            offsets = self._prompt.offsets[start + 1 : stop]
            ids = self._prompt.ids[start + 1 : stop]
            self._entries.extend(self._listing.entries(rows, slice(0, len(ids)), ids, offsets))
        if self._at <= last:
            return None  # not asked for yet
        if not self._asked.max_tokens:
            self._finish("length")
            return None
        return self._next(rows)

    def _next(self, rows: Rows) -> int | None:
        """Choose a token by the last row."""
        token = self._sampler.choose(rows.logits[-1])
        self._generated += 1
        if self._listing:
            self._entries.extend(self._listing.entries(rows, slice(-1, None), [token], [self._decoded]))
        ends, stops = token in self._ends, self._generated > self._asked.min_tokens
        if token not in self._hidden and (not ends or self._asked.include_stop_str_in_output):
            self._say(self._detokenizer.feed(token), stops=stops)
        if self._stops.found is not None:
            self._finish("stop", self._stops.found, token)
        elif ends:
            self._finish("stop", token if token in self._asked.stop_token_ids else None, token)
        elif self._generated == self._asked.max_tokens:
            self._finish("length", None, token)
        else:
            self._put_piece([token])
            return token
        return None

    def _say(self, text: str, *, stops: bool) -> None:
        self._decoded += len(text)
        self._text += self._stops.feed(text) if stops else text

    def _finish(self, reason: str, stop_reason: str | int | None = None, *tokens: int) -> None:
        if self._stops.found is None:
            self._say(self._detokenizer.flush(), stops=self._generated > self._asked.min_tokens)
            if self._stops.found is not None:
                reason, stop_reason = "stop", self._stops.found
        if self._stops.found is None:
            self._text += self._stops.flush()
        elif self._asked.include_stop_str_in_output:
            self._text += self._stops.found
        self._put_piece(list(tokens), reason, stop_reason)

    def _put_piece(self, tokens: list[int], reason: str | None = None, stop_reason: str | int | None = None) -> None:
        text, self._text = self._text, ""
        self._said += len(text)
        logprobs = self._entries.take(self._said, last=reason is not None) if self._listing else None
        self._put(Piece(text, logprobs, tokens, self._generated, reason, stop_reason))


def ends_of(asked: CompletionRequest, variant: Variant) -> set[int]:
    """The tokens that end a choice."""
    eos = variant.vocabulary.eos_id
    return {*asked.stop_token_ids} | ({eos} if eos is not None and not asked.ignore_eos else set())


def sampling_of(asked: CompletionRequest, variant: Variant) -> Sampling:
    """What all choices of a request have in common."""
    return Sampling(
        temperature=asked.temperature,
        min_p=asked.min_p,
        top_k=max(0, asked.top_k),
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=asked.logit_bias,
        ends=ends_of(asked, variant),
        min_tokens=asked.min_tokens,
    )
