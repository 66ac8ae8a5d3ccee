"""`POST /v1/completions`, from a checked request to the bytes of its answer; service/events.py streams it.

    encode -> one job per choice -> engine.run: each choice reads its rows, samples, turns tokens to text -> answer

A choice puts out pieces as it goes, in the engine's thread. They are the chunks of a stream; joined they are the
choice of an answer that is not streamed, so that the two cannot differ. B prompts, n choices of each.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from pydantic_core import to_json

from service.choice import Choice, Piece, Prompt, ends_of, sampling_of
from service.completions_schema import CompletionRequest
from service.detokenizer import Detokenizer
from service.engine import Done, Job
from service.errors import Invalid, shown
from service.library import Library
from service.logprobs import Entries
from service.next_token import (
    INLINE_CHARACTERS,
    INLINE_ENTRIES,
    Answered,
    check_ids,
    check_in_vocabulary,
    check_length,
    here_or_in_a_thread,
)
from service.sequence import Runs
from service.settings import Settings
from service.variant import Variant

ENTRY_BYTES = 60  # of memory for each log-probability that is listed


@dataclass
class Completing:
    """A request on its way: its choices' jobs, and what is common to the answer's parts."""

    asked: CompletionRequest
    variant: Variant
    prompts: list[Prompt]
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

    def jobs(self, put: Callable[[int, Piece], None]) -> list[Job]:
        """One for each choice, whose pieces are `put` with its index."""
        jobs, sampling = [], sampling_of(self.asked, self.variant)
        for prompt in self.prompts:
            for number in range(self.asked.n):
                index = prompt.index * self.asked.n + number

                def put_its(piece: Piece, index: int = index) -> None:
                    put(index, piece)

                choice = Choice(self.asked, sampling, self.variant, prompt, number, put_its)
                size = ENTRY_BYTES * _each(self.asked) * _places(self.asked, [prompt])
                # The last token that is generated need not be computed.
                most = max(0, self.asked.max_tokens - 1)
                jobs.append(Job(self.variant, prompt.ids, choice.top_k, choice, most, size))
        return jobs

    def choice(self, index: int, pieces: Sequence[Piece], *, first: bool) -> dict[str, Any]:
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
        # What a prompt's first choice found; the others find that and what the first one computed. With echo and
        # logprobs none finds anything: each one's rows are all computed.
        cached = sum(each.cached_tokens for each in done[:: self.asked.n])
        usage = usage_of(sum(len(prompt.ids) for prompt in self.prompts), sum(generated))
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    def answered(self, body: bytes, done: Sequence[Done]) -> Answered:
        last = max(done, key=lambda each: each.at)
        return Answered(body, 1e3 * self.tokenize_s, 1e3 * last.queue_s, 1e3 * last.infer_s)


def usage_of(prompt_tokens: int, generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


async def prepare(asked: CompletionRequest, library: Library, settings: Settings) -> Completing:
    """Check and encode `asked`; ApiError where it cannot be answered."""
    variant = library.one(asked.model)
    _check_size(asked, variant, settings)
    to_read = sum(len(prompt) for prompt in asked.prompt if isinstance(prompt, str) or asked.echo)
    start = perf_counter()
    prompts = await here_or_in_a_thread(to_read <= INLINE_CHARACTERS, lambda: _encode(asked, variant, settings))
    return Completing(asked, variant, prompts, perf_counter() - start)


async def complete(asked: CompletionRequest, library: Library, engine: Runs, settings: Settings) -> Answered:
    """The answer that is not streamed."""
    completing = await prepare(asked, library, settings)
    pieces: list[list[Piece]] = [[] for _ in range(completing.choices)]
    done = await engine.run(completing.jobs(lambda index, piece: pieces[index].append(piece)))

    def body() -> bytes:
        choices = [completing.choice(index, its, first=True) for index, its in enumerate(pieces)]
        usage = completing.usage([its[-1].generated for its in pieces], done)
        return to_json({**completing.head, "choices": choices, "usage": usage})

    listed = sum(piece.listed for its in pieces for piece in its)
    return completing.answered(await here_or_in_a_thread(listed <= INLINE_ENTRIES, body), done)


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
    if asked.min_tokens and len(ends_of(asked, variant)) == vocab_size:
        raise Invalid("stop_token_ids holds the whole vocabulary, so that min_tokens allows none", "stop_token_ids")


def _encode(asked: CompletionRequest, variant: Variant, settings: Settings) -> list[Prompt]:
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


def _check_entries(asked: CompletionRequest, prompts: Sequence[Prompt], settings: Settings) -> None:
    each, places = _each(asked), asked.n * _places(asked, prompts)
    if places * each > settings.max_entries:
        raise Invalid(
            f"{each} log-probabilities at each of up to {places} tokens are {places * each}; one answer may list "
            f"{settings.max_entries}: lower logprobs or max_tokens, or send several requests",
            "logprobs",
        )


def _each(asked: CompletionRequest) -> int:
    """Log-probabilities at each place."""
    return max(1, (asked.logprobs or 0) + len(asked.logprob_token_ids or ())) if asked.lists_logprobs else 0


def _places(asked: CompletionRequest, prompts: Sequence[Prompt]) -> int:
    """Tokens of one choice of each prompt that may be listed."""
    return sum(asked.max_tokens + (len(prompt.ids) if asked.echo else 0) for prompt in prompts)


def _prompt(index: int, prompt: str | list[int], ids: list[int], asked: CompletionRequest, variant: Variant) -> Prompt:
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
    return Prompt(index, ids, not isinstance(prompt, str), text, offsets)
