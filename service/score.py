"""`POST /v1/score`: how likely each label is as the next token after query + item. SGLang's shape and convention:

    apply_softmax false: exp(logit of the label) / sum over V of exp(logit), the plain probability
    apply_softmax true:  exp(logit of the label) / sum over the labels of exp(logit); a row sums to 1

Of texts it is query + item that is tokenized, as one text: a token may span the border, and what the tokenizer puts
before a prompt comes once. Of ids the lists are joined as they are. `item_first` puts the item before the query.
"""

from __future__ import annotations

import json
from time import perf_counter

import numpy as np

from service.engine import Engine, Job
from service.errors import ApiError, Invalid
from service.library import Library
from service.next_token import (
    INLINE_CHARACTERS,
    Answered,
    check_ids,
    check_in_vocabulary,
    check_length,
    here_or_in_a_thread,
)
from service.schema import ScoreRequest
from service.settings import Settings
from service.variant import Row, Variant

INLINE_SCORES = 1_000  # 1 us each, and 10 us per item


async def score(asked: ScoreRequest, library: Library, engine: Engine, settings: Settings) -> Answered:
    """Answer `asked`; ApiError where it cannot be."""
    variant = library.one(asked.model)
    characters = _check_size(asked, variant, settings)
    start = perf_counter()
    prompts = await here_or_in_a_thread(characters <= INLINE_CHARACTERS, lambda: _encode(asked, variant))
    tokenize_s = perf_counter() - start
    done = await engine.run([Job(variant, ids, 0) for ids in prompts])
    tokens = sum(map(len, prompts))

    def answer() -> bytes:
        scores = [_scores(each.only, asked, variant) for each in done]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        fields = {"object": "scoring", "model": variant.name, "scores": scores, "usage": usage}
        return json.dumps(fields, allow_nan=False).encode()

    body = await here_or_in_a_thread(len(done) * len(asked.label_token_ids) <= INLINE_SCORES, answer)
    last = max(done, key=lambda each: each.at, default=None)
    queue_s, infer_s = (last.queue_s, last.infer_s) if last else (0.0, 0.0)
    return Answered(body, 1e3 * tokenize_s, 1e3 * queue_s, 1e3 * infer_s)


def _check_size(asked: ScoreRequest, variant: Variant, settings: Settings) -> int:
    """The characters to tokenize; 422 where they, the items or the labels are too many."""
    items, labels = len(asked.items), len(asked.label_token_ids)
    if items > settings.max_prompts:
        raise Invalid(f"{items} items; one request may have {settings.max_prompts}: send several requests", "items")
    if items * labels > settings.max_entries:
        raise Invalid(
            f"{items} items of {labels} labels are {items * labels} scores; one answer may have "
            f"{settings.max_entries}: send several requests",
            "label_token_ids",
        )
    check_in_vocabulary(asked.label_token_ids, "label_token_ids", variant)
    if not isinstance(asked.query, str):
        return 0
    # The query is tokenized with each item.
    characters = items * len(asked.query) + sum(map(len, asked.items))
    if characters > settings.max_body_bytes:
        raise Invalid(
            f"{items} items, each with the query, have {characters} characters; one request may have "
            f"{settings.max_body_bytes}: send several requests",
            "items",
        )
    return characters


def _encode(asked: ScoreRequest, variant: Variant) -> list[list[int]]:
    """The ids of each item with its query."""
    prompts = []
    for at, item in enumerate(asked.items):
        where = f"query + items[{at}]"
        if isinstance(asked.query, str) and isinstance(item, str):
            text = item + asked.query if asked.item_first else asked.query + item
            check_length(variant.vocabulary.fewest_tokens(text), where, variant, "at least ")
            ids = variant.vocabulary.encode(text)
        else:
            check_length(len(asked.query) + len(item), where, variant)  # before they are joined
            ids = [*item, *asked.query] if asked.item_first else [*asked.query, *item]
        check_ids(ids, where, variant)
        prompts.append(ids)
    return prompts


def _scores(row: Row, asked: ScoreRequest, variant: Variant) -> list[float]:
    """One per label. Of the labels alone in float64, from logits: their probabilities may all round to 0."""
    labels = asked.label_token_ids
    if not np.isfinite(row.entropy_bits).all():
        raise ApiError("internal", f"variant {variant.name!r} gives no finite probabilities for this prompt")
    if not asked.apply_softmax:
        return list(row.softmax[labels].tolist())
    logits = row.logits[labels].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return list((weights / weights.sum()).tolist())
