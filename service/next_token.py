"""`POST /v1/next-token`, from a checked request to the bytes of its answer.

    encode -> engine.run -> turn rows to entries -> answer

B prompts, V the vocabulary, as everywhere.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from pydantic_core import to_json

from service.engine import Done, Job
from service.errors import ApiError, Invalid, shown
from service.schema import NextTokenRequest
from service.sequence import Runs
from service.settings import Settings
from service.variant import Row, Variant
from service.vocabulary import Vocabulary

T = TypeVar("T")

# Work up to these sizes takes about 2 ms at most and is done on the event loop; more goes to a thread.
INLINE_CHARACTERS = 2_000  # 0.8 us each
INLINE_ENTRIES = 500  # 4 us each
ENTRIES_PER_CHOSEN = 7  # its rank costs 25 us besides at V = 50257, 11 us at V = 2048


@dataclass(frozen=True)
class Answered:
    """An answer's JSON, and the times of its headers in milliseconds."""

    body: bytes
    tokenize_ms: float
    queue_ms: float
    infer_ms: float


@dataclass(frozen=True)
class _Item:
    """One result to come: a prompt under a variant."""

    prompt_index: int
    job: Job
    chosen: list[int]
    tokenize_s: float


async def next_token(
    asked: NextTokenRequest, variants: Sequence[Variant], engine: Runs, settings: Settings, arrived: float
) -> Answered:
    """Answer `asked` by each of `variants`, of a request that arrived at `arrived` by perf_counter; ApiError where it
    cannot be."""
    entries = _check_size(asked, variants, settings)
    characters = sum(len(text) for text in (*asked.prompt, *asked.tokens) if isinstance(text, str))
    items, tokenize_s = await here_or_in_a_thread(characters <= INLINE_CHARACTERS, lambda: _encode(asked, variants))
    done = await engine.run([item.job for item in items])
    body = await here_or_in_a_thread(entries <= INLINE_ENTRIES, lambda: _body(items, done, arrived))
    last = max(done, key=lambda each: each.at)  # its times, with tokenize, add up to no more than the total
    return Answered(body, tokenize_ms=1e3 * tokenize_s, queue_ms=1e3 * last.queue_s, infer_ms=1e3 * last.infer_s)


async def here_or_in_a_thread(here: bool, work: Callable[[], T]) -> T:
    return work() if here else await asyncio.to_thread(work)


def _check_size(asked: NextTokenRequest, variants: Sequence[Variant], settings: Settings) -> int:
    """The answer's size in entries of `top`; 422 where that, top_k or the number of results is too much."""
    results = len(asked.prompt) * len(variants)
    if results > settings.max_prompts:
        raise Invalid(
            f"{len(asked.prompt)} prompts for {len(variants)} variants are {results} results; "
            f"one request may ask for {settings.max_prompts}: send several requests",
            "prompt",
        )
    for variant in variants:
        if asked.top_k > variant.manifest.vocab_size:
            raise Invalid(
                f"top_k {shown(asked.top_k)} is more than the vocabulary of variant {variant.name!r}; "
                f"allowed: 0 to {variant.manifest.vocab_size}",
                "top_k",
            )
    entries = results * (asked.top_k + len(asked.tokens))
    if results > 1 and entries > settings.max_entries:
        raise Invalid(
            f"{results} results of {asked.top_k} top and {len(asked.tokens)} chosen tokens list {entries}; "
            f"one answer may list {settings.max_entries}: lower top_k or send several requests",
            "top_k",
        )
    return results * (asked.top_k + ENTRIES_PER_CHOSEN * len(asked.tokens))


def _encode(asked: NextTokenRequest, variants: Sequence[Variant]) -> tuple[list[_Item], float]:
    """Each prompt under each variant, prompts outermost; and the seconds that took.

    Variants with the same tokenizer share its ids.
    """
    start = perf_counter()
    chosen = [
        [chosen_id(token, f"tokens[{at}]", variant) for at, token in enumerate(asked.tokens)] for variant in variants
    ]
    items = []
    for index, prompt in enumerate(asked.prompt):
        where = f"prompt[{index}]" if len(asked.prompt) > 1 else "prompt"
        encoded: dict[Vocabulary, tuple[list[int], float]] = {}
        for variant, its_chosen in zip(variants, chosen, strict=True):
            if isinstance(prompt, str):
                check_length(variant.vocabulary.fewest_tokens(prompt), where, variant, "at least ")
            if variant.vocabulary not in encoded:
                began = perf_counter()
                ids = variant.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
                encoded[variant.vocabulary] = ids, perf_counter() - began
            ids, tokenize_s = encoded[variant.vocabulary]
            check_ids(ids, where, variant)
            items.append(_Item(index, Job(variant, ids, asked.top_k), its_chosen, tokenize_s))
    return items, perf_counter() - start


def check_ids(ids: Sequence[int], where: str, variant: Variant) -> None:
    """Refuse what the variant has no place or no row for."""
    if not ids:
        raise Invalid(f"{where} is no token at all for variant {variant.name!r}", where)
    check_length(len(ids), where, variant)
    check_in_vocabulary(ids, where, variant)


def check_in_vocabulary(ids: Sequence[int], where: str, variant: Variant) -> None:
    vocab_size = variant.manifest.vocab_size
    outside = next((id_ for id_ in ids if not 0 <= id_ < vocab_size), None)
    if outside is not None:
        raise Invalid(
            f"{where} holds the id {shown(outside)}; variant {variant.name!r} has 0 to {vocab_size - 1}",
            where,
        )


def check_length(tokens: int, where: str, variant: Variant, at_least: str = "") -> None:
    context = variant.manifest.context
    if tokens > context:
        raise Invalid(
            f"{where} has {at_least}{tokens} tokens, over the context of {variant.name!r}, {context}; shorten it",
            where,
        )


def chosen_id(token: str | int, where: str, variant: Variant) -> int:
    """The id of a token that was asked for by id or by text."""
    if isinstance(token, int):
        check_ids([token], where, variant)
        return token
    fewest = variant.vocabulary.fewest_tokens(token)
    if fewest > 1:
        raise Invalid(
            f"{where}, {shown(token)}, is at least {fewest} tokens for variant {variant.name!r}; "
            "give a text of exactly one token, or an id",
            where,
        )
    ids = variant.vocabulary.encode(token, special_tokens=False)
    if len(ids) != 1:
        raise Invalid(
            f"{where}, {shown(token)}, is {len(ids)} tokens for variant {variant.name!r}, with the ids "
            f"{shown(ids)}; give a text of exactly one token, or an id",
            where,
        )
    return ids[0]


def _body(items: Sequence[_Item], done: Sequence[Done], arrived: float) -> bytes:
    """The answer as JSON, its results one at a time: all of them as entries would be much larger."""
    tokens = sum(len(item.job.ids) for item in items)
    head = {"object": "next_token", "id": f"nt-{secrets.token_hex(12)}", "created": int(time.time())}
    results = b",".join(to_json(_result(item, each, arrived)) for item, each in zip(items, done, strict=True))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return b'%b,"results":[%b],"usage":%b}' % (to_json(head)[:-1], results, to_json(usage))


def _result(item: _Item, done: Done, arrived: float) -> dict[str, Any]:
    """One prompt under one variant."""
    variant, row = item.job.variant, done.only
    manifest, vocabulary = variant.manifest, variant.vocabulary
    if not np.isfinite(row.entropy_bits).all():
        raise ApiError("internal", f"variant {variant.name!r} gives no finite probabilities for this prompt")
    (softmax_mass, sigmoid_mass), (softmax_bits, sigmoid_bits) = row.mass.tolist(), row.entropy_bits.tolist()
    top = row.top_ids[: item.job.top_k].tolist()
    return {
        "prompt_index": item.prompt_index,
        "model": manifest.name,
        "activation": manifest.activation,
        "head": manifest.head,
        "precision": manifest.precision,
        "provider": variant.provider,
        "prompt_tokens": len(item.job.ids),
        "softmax": {"mass": softmax_mass, "entropy_bits": softmax_bits},
        "sigmoid": {"mass": sigmoid_mass, "entropy_bits": sigmoid_bits},
        "top": _entries(range(1, len(top) + 1), top, row, vocabulary),
        "chosen": _entries([_rank(row, id_) for id_ in item.chosen], item.chosen, row, vocabulary),
        "timing_ms": {
            "tokenize": 1e3 * item.tokenize_s,
            "queue": 1e3 * done.queue_s,
            "infer": 1e3 * done.infer_s,
            "total": 1e3 * (done.at - arrived),
        },
    }


def _rank(row: Row, id_: int) -> int:
    """From 1 by falling logit; of equal ones, the smaller id first."""
    logit = row.logits[id_]
    return 1 + int(np.count_nonzero(row.logits > logit) + np.count_nonzero(row.logits[:id_] == logit))


def _entries(ranks: Sequence[int], ids: list[int], row: Row, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    columns = (column[ids].tolist() for column in (row.logits, row.softmax, row.sigmoid))
    entries = []
    for rank, id_, logit, softmax, sigmoid in zip(ranks, ids, *columns, strict=True):
        text, bytes_ = vocabulary.text_of(id_)
        entry = {"rank": rank, "id": id_, "text": text, "logit": logit}
        entry |= {"softmax": softmax, "sigmoid": sigmoid}
        if bytes_ is not None:
            entry["bytes"] = bytes_
        entries.append(entry)
    return entries
