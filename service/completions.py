"""`POST /v1/completions`, from a checked request to the bytes of its answer or of its events.

    encode -> one job per choice -> engine.run: each choice reads its rows, samples, turns tokens to text -> answer

A choice puts out pieces as it goes, in the engine's thread. They are the chunks of a stream; joined they are the
choice of an answer that is not streamed, so that the two cannot differ. B prompts, n choices of each.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from service.completions_schema import CompletionRequest, StreamOptions
from service.detokenizer import Detokenizer
from service.errors import ApiError, Invalid, defect, fields, shown
from service.json_text import dumps
from service.library import Library
from service.logprobs import Entries, Listing
from service.next_token import (
    INLINE_CHARACTERS,
    INLINE_ENTRIES,
    Answered,
    check_ids,
    check_in_vocabulary,
    check_length,
    here_or_in_a_thread,
)
from service.recompute import Done, Job, Rows
from service.sampling import Sampler, Sampling
from service.settings import Settings
from service.stops import Stops
from service.variant import Variant

log = logging.getLogger("actuary.service")

DONE = b"data: [DONE]\n\n"


class Engine(Protocol):
    def run(self, jobs: Sequence[Job]) -> Awaitable[list[Done]]: ...


@dataclass(frozen=True)
class _Prompt:
    index: int
    ids: list[int]
    given_as_ids: bool
    text: str  # of `echo`, else empty
    offsets: list[int]  # of each id in `text`; of `echo` with logprobs, else empty


@dataclass(frozen=True)
class _Piece:
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


class _Choice:
    """One completion of one prompt: the engine's Reader, which puts out pieces."""

    def __init__(
        self, asked: CompletionRequest, variant: Variant, prompt: _Prompt, number: int, put: Callable[[_Piece], None]
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
        self._ends = _ends(asked, variant)
        self._sampler = Sampler(
            _sampling(asked),
            variant.manifest.vocab_size,
            prompt.ids,
            self._ends,
            asked.min_tokens,
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
        self._put(_Piece(text, logprobs, tokens, self._generated, reason, stop_reason))


@dataclass
class _Completing:
    """A request on its way: its choices' jobs, and what is common to the answer's parts."""

    asked: CompletionRequest
    variant: Variant
    prompts: list[_Prompt]
    tokenize_s: float
    head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.variant.name,
        }

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.asked.n

    def jobs(self, put: Callable[[int, _Piece], None]) -> list[Job]:
        """One for each choice, whose pieces are `put` with its index."""
        jobs = []
        for prompt in self.prompts:
            for number in range(self.asked.n):
                index = prompt.index * self.asked.n + number

                def put_its(piece: _Piece, index: int = index) -> None:
                    put(index, piece)

                choice = _Choice(self.asked, self.variant, prompt, number, put_its)
                # The last token that is generated need not be computed.
                jobs.append(Job(self.variant, prompt.ids, choice.top_k, choice, max(0, self.asked.max_tokens - 1)))
        return jobs

    def choice(self, index: int, pieces: Sequence[_Piece], *, first: bool) -> dict[str, Any]:
        """`pieces` of one choice as one; `first` where its first is among them."""
        last = pieces[-1]
        fields: dict[str, Any] = {"index": index, "text": "".join(piece.text for piece in pieces), "logprobs": None}
        if last.logprobs is not None:
            entries = Entries()
            for piece in pieces:
                assert piece.logprobs is not None
                entries.extend(piece.logprobs)
            fields["logprobs"] = vars(entries)
        fields |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        if self.asked.return_token_ids:
            fields["token_ids"] = [token for piece in pieces for token in piece.token_ids]
            if first:
                fields["prompt_token_ids"] = self.prompts[index // self.asked.n].ids
        return fields

    def usage(self, generated: Sequence[int], done: Sequence[Done]) -> dict[str, Any]:
        # Of a prompt's choices the first computes it; the others find it.
        cached = sum(each.cached_tokens for each in done[:: self.asked.n])
        usage = _usage(sum(len(prompt.ids) for prompt in self.prompts), sum(generated))
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    def answered(self, body: bytes, done: Sequence[Done]) -> Answered:
        last = max(done, key=lambda each: each.at)
        return Answered(body, 1e3 * self.tokenize_s, 1e3 * last.queue_s, 1e3 * last.infer_s)


def _usage(prompt_tokens: int, generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


async def completions(
    asked: CompletionRequest, library: Library, engine: Engine, settings: Settings, request_id: str
) -> Answered | Events:
    """Answer `asked`, or begin to where it is streamed; ApiError where that cannot be."""
    variant = library.one(asked.model)
    _check_size(asked, variant, settings)
    to_read = sum(len(prompt) for prompt in asked.prompt if isinstance(prompt, str) or asked.echo)
    start = perf_counter()
    prompts = await here_or_in_a_thread(to_read <= INLINE_CHARACTERS, lambda: _encode(asked, variant, settings))
    completing = _Completing(asked, variant, prompts, perf_counter() - start)
    if not asked.stream:
        return await _complete(completing, engine)
    events = Events(completing, engine, request_id)
    try:
        await events.start()
    except BaseException:  # the client's leaving too
        events.close()
        raise
    return events


def _check_size(asked: CompletionRequest, variant: Variant, settings: Settings) -> None:
    """422 for too many choices, or for what the vocabulary has not."""
    choices = len(asked.prompt) * asked.n
    if choices > settings.max_prompts:
        raise Invalid(
            f"{len(asked.prompt)} prompts, each {shown(asked.n)} times, are {shown(choices)} choices; one request may "
            f"ask for {settings.max_prompts}: send several requests",
            "n" if asked.n > 1 else "prompt",
        )
    vocab_size = variant.manifest.vocab_size
    if (asked.logprobs or 0) > vocab_size:
        raise Invalid(
            f"logprobs {shown(asked.logprobs)} is more than the vocabulary of variant {variant.name!r}; "
            f"allowed: 0 to {vocab_size}",
            "logprobs",
        )
    check_in_vocabulary(list(asked.logit_bias), "logit_bias", variant)
    check_in_vocabulary(asked.stop_token_ids, "stop_token_ids", variant)
    check_in_vocabulary(asked.logprob_token_ids or [], "logprob_token_ids", variant)
    if asked.min_tokens and len(_ends(asked, variant)) == vocab_size:
        raise Invalid("stop_token_ids holds the whole vocabulary, so that min_tokens allows none", "stop_token_ids")


def _ends(asked: CompletionRequest, variant: Variant) -> set[int]:
    """The tokens that end a choice."""
    eos = variant.vocabulary.eos_id
    return {*asked.stop_token_ids} | ({eos} if eos is not None and not asked.ignore_eos else set())


def _encode(asked: CompletionRequest, variant: Variant, settings: Settings) -> list[_Prompt]:
    """The prompts, each of which fits the context with what is to be generated; and all fit one answer."""
    prompts = []
    for index, prompt in enumerate(asked.prompt):
        where = f"prompt[{index}]" if len(asked.prompt) > 1 else "prompt"
        if isinstance(prompt, str):
            check_length(variant.vocabulary.fewest_tokens(prompt), where, variant, "at least ")
            ids = variant.vocabulary.encode(prompt, special_tokens=asked.add_special_tokens)
        else:
            ids = prompt
        check_ids(ids, where, variant)
        room = variant.manifest.context - len(ids)
        if asked.max_tokens > room:
            raise Invalid(
                f"{where} has {len(ids)} tokens and max_tokens is {shown(asked.max_tokens)}, over the context of "
                f"{variant.name!r}, {variant.manifest.context}, together; allowed for this prompt: 0 to {room}",
                "max_tokens",
            )
        prompts.append(_prompt(index, prompt, ids, asked, variant))
    _check_entries(asked, prompts, settings)
    return prompts


def _check_entries(asked: CompletionRequest, prompts: Sequence[_Prompt], settings: Settings) -> None:
    if not asked.lists_logprobs:
        return
    each = max(1, (asked.logprobs or 0) + len(asked.logprob_token_ids or ()))
    places = asked.n * sum(asked.max_tokens + (len(prompt.ids) if asked.echo else 0) for prompt in prompts)
    if places * each > settings.max_entries:
        raise Invalid(
            f"{each} log-probabilities at each of up to {places} tokens are {places * each}; one answer may list "
            f"{settings.max_entries}: lower logprobs or max_tokens, or send several requests",
            "logprobs",
        )


def _prompt(index: int, prompt: str | list[int], ids: list[int], asked: CompletionRequest, variant: Variant) -> _Prompt:
    """`prompt` with what `echo` says of it."""
    text, offsets = "", list[int]()
    if asked.echo and (asked.lists_logprobs or not isinstance(prompt, str)):
        detokenizer, before, after = Detokenizer(variant.vocabulary), 0, 0
        if isinstance(prompt, str) and asked.add_special_tokens:
            before, after = variant.vocabulary.around(prompt)
        for at, id_ in enumerate(ids):
            offsets.append(len(text))
            if before <= at < len(ids) - after:  # what the tokenizer put around the text is not in it
                text += detokenizer.feed(id_)
    if asked.echo and isinstance(prompt, str):
        # What was given, where a normalizer made something else of it.
        text, offsets = prompt, [min(offset, len(prompt)) for offset in offsets]
    return _Prompt(index, ids, not isinstance(prompt, str), text, offsets)


def _sampling(asked: CompletionRequest) -> Sampling:
    return Sampling(
        temperature=asked.temperature,
        min_p=asked.min_p,
        top_k=max(0, asked.top_k),
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=asked.logit_bias,
    )


async def _complete(completing: _Completing, engine: Engine) -> Answered:
    """The answer that is not streamed."""
    pieces: list[list[_Piece]] = [[] for _ in range(completing.choices)]
    done = await engine.run(completing.jobs(lambda index, piece: pieces[index].append(piece)))

    def body() -> bytes:
        choices = [completing.choice(index, its, first=True) for index, its in enumerate(pieces)]
        usage = completing.usage([its[-1].generated for its in pieces], done)
        return dumps({**completing.head, "choices": choices, "usage": usage}).encode()

    listed = sum(piece.listed for its in pieces for piece in its)
    return completing.answered(await here_or_in_a_thread(listed <= INLINE_ENTRIES, body), done)


class Events:
    """An answer as server-sent events: a chunk for each piece; the last says [DONE], or an error."""

    def __init__(self, completing: _Completing, engine: Engine, request_id: str) -> None:
        self._completing = completing
        self._options = completing.asked.stream_options or StreamOptions()
        self._request_id = request_id
        self._pieces = asyncio.Queue[tuple[int, _Piece] | None]()  # None: the engine has ended, well or not
        self._ready: list[tuple[int, _Piece]] = []
        self._ended = False
        self._generated = [0] * completing.choices
        self._begun = [False] * completing.choices
        self.tokenize_s = completing.tokenize_s
        self.answered: Answered | None = None  # once all is sent
        loop = asyncio.get_running_loop()

        def put(index: int, piece: _Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        self._work = asyncio.ensure_future(engine.run(completing.jobs(put)))
        self._work.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def start(self) -> None:
        """Wait for the first pieces: what fails before them fails here, and is answered with its status."""
        await self._fill()
        if self._ended and not self._ready:
            await self._work

    def close(self) -> None:
        """Drop what is not computed yet."""
        self._work.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while self._ready:
                listed = sum(piece.listed for _, piece in self._ready)
                yield await here_or_in_a_thread(listed <= INLINE_ENTRIES, self._chunks)
                await self._fill()
            done = await self._work
        except ApiError as error:
            yield _event({"error": fields(error)})
        except Exception:
            log.exception("request %s failed while its answer was streamed", self._request_id)
            yield _event({"error": fields(defect(self._request_id))})
        else:
            self.answered = self._completing.answered(b"", done)
            if self._options.include_usage:
                usage = self._completing.usage(self._generated, done)
                yield _event({**self._completing.head, "choices": [], "usage": usage})
            yield DONE

    async def _fill(self) -> None:
        """The pieces that are there, at least one; none where no more will come."""
        self._ready = []
        while not self._ended and not (self._ready and self._pieces.empty()):
            piece = await self._pieces.get()
            if piece is None:
                self._ended = True
            else:
                self._ready.append(piece)

    def _chunks(self) -> bytes:
        return b"".join(self._chunk(index, piece) for index, piece in self._ready)

    def _chunk(self, index: int, piece: _Piece) -> bytes:
        first, self._begun[index] = not self._begun[index], True
        self._generated[index] = piece.generated
        chunk = {**self._completing.head, "choices": [self._completing.choice(index, [piece], first=first)]}
        if self._options.include_usage:
            chunk["usage"] = None
            if self._options.continuous_usage_stats:
                prompt = self._completing.prompts[index // self._completing.asked.n]
                chunk["usage"] = _usage(len(prompt.ids), piece.generated)
        return _event(chunk)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {dumps(content)}\n\n".encode()
