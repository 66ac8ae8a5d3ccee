"""`/tokenizer_info`, `/tokenize` and `/detokenize` in vLLM's shapes, which lm-eval's remote tokenizer reads.

Variants with the same tokenizer.json share a Vocabulary; a request need not name one where all share it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from service.errors import ApiError, Invalid, shown
from service.library import Library
from service.next_token import INLINE_CHARACTERS
from service.schema import DetokenizeRequest, TokenizeRequest, TokenizerInfo
from service.settings import Settings
from service.variant import Variant

INLINE_IDS = 2_000  # 0.2 us each to decode, 1 us where their bytes are listed


class Tokens:
    """The tokenizers of a library, for others to use."""

    def __init__(self, library: Library, settings: Settings) -> None:
        self._library = library
        self._settings = settings
        # One large text at a time: each takes 100 bytes of memory per byte.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def info(self, model: str) -> bytes:
        """The tokenizer of the variant called `model`, or of all for "*"."""
        variants = self._choose(model)
        fields = {
            **variants[0].vocabulary.special_tokens,
            "model_max_length": _context(variants),
            "vocab_size": _vocab_size(variants),
            "models": [variant.name for variant in variants],
        }
        return _json(TokenizerInfo.model_validate(fields).model_dump())

    async def tokenize(self, asked: TokenizeRequest) -> bytes:
        variants = self._choose(asked.model)
        vocabulary, size = variants[0].vocabulary, len(asked.prompt.encode())
        if size > self._settings.max_text_bytes:
            raise ApiError(
                "too_large",
                f"prompt has {size} bytes; allowed: {self._settings.max_text_bytes}; send it in parts",
                "prompt",
            )

        def answer() -> bytes:
            ids = vocabulary.encode(asked.prompt, special_tokens=asked.add_special_tokens)
            spelt = list(map(vocabulary.token_of, ids)) if asked.return_token_strs else None
            return _json({"count": len(ids), "max_model_len": _context(variants), "tokens": ids, "token_strs": spelt})

        return await self._run(size <= INLINE_CHARACTERS, answer)

    async def detokenize(self, asked: DetokenizeRequest) -> bytes:
        variants = self._choose(asked.model)
        if len(asked.tokens) > self._settings.max_entries:
            raise ApiError(
                "too_large",
                f"tokens holds {len(asked.tokens)} ids; allowed: {self._settings.max_entries}; send them in parts",
                "tokens",
            )
        vocab_size = _vocab_size(variants)

        def answer() -> bytes:
            for at, id_ in enumerate(asked.tokens):
                if not 0 <= id_ < vocab_size:
                    where = f"tokens[{at}]"
                    raise Invalid(f"{where} is the id {shown(id_)}; there are 0 to {vocab_size - 1}", where)
            text, bytes_ = variants[0].vocabulary.decode(asked.tokens)
            return _json({"prompt": text} if bytes_ is None else {"prompt": text, "bytes": bytes_})

        return await self._run(len(asked.tokens) <= INLINE_IDS, answer)

    def _choose(self, model: str) -> list[Variant]:
        """The variants that are meant, all with the same tokenizer; 422 where they have not."""
        variants = self._library.choose([model])
        groups: dict[int, list[str]] = {}
        for variant in variants:
            groups.setdefault(id(variant.vocabulary), []).append(variant.name)
        if len(groups) > 1:
            shared = "; ".join(", ".join(names) for names in groups.values())
            raise Invalid(
                f"name a model, since the variants have {len(groups)} different tokenizers: {shared}", "model"
            )
        return variants

    async def _run(self, here: bool, work: Callable[[], bytes]) -> bytes:
        """On the event loop, where it takes about 2 ms at most; else in a thread, one at a time."""
        if here:
            return work()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TimeoutError:
            raise ApiError("timeout", f"no answer within {self._settings.timeout_s:g} s; try later") from None


def _context(variants: list[Variant]) -> int:
    return min(variant.manifest.context for variant in variants)


def _vocab_size(variants: list[Variant]) -> int:
    return min(variant.manifest.vocab_size for variant in variants)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
