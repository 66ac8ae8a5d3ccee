"""A tokenizer.json as the service needs it: text to ids, and one id to the text and bytes it stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\ufffd"


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet (GPT-2, encoder.py): printable Latin-1 is itself, others are U+0100 on."""
    itself = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte

# Which special token has which part, tokenizer.json does not say. The names that published models gave them, the
# first that is there: GPT-2 and ours have one token for both ends.
_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
    "pad_token": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
}


def _bytes_in(token: str) -> list[int] | None:
    """The bytes that a byte-level vocabulary spells as `token`; None where it is no such spelling."""
    try:
        return [_BYTE_OF_CHARACTER[character] for character in token]
    except KeyError:
        return None


class Vocabulary:
    """Shared by every variant whose tokenizer.json is the same."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()  # a prompt that is too long is refused, not cut
        self._tokenizer.no_padding()
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._tokenizer.encode("compiles its patterns now, not in the first request")
        self._texts: dict[int, tuple[str, list[int] | None]] = {}
        self._longest_token_bytes = self._find_longest_token_bytes()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with whatever special tokens the tokenizer puts around a prompt.

        `encode_batch_fast` lets other threads run meanwhile, where `encode` holds the GIL: during one
        prompt of 1 MB the event loop stood still for 946 ms, now for 12 ms (tokenizers 0.23.3).
        """
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> tuple[str, list[int] | None]:
        """The text of `ids`, with its special tokens; and its bytes, where these are not valid UTF-8.

        Bytes are known of byte-level vocabularies only. An id that has no token has no text. `decode_batch` lets
        other threads run meanwhile, where `decode` holds the GIL (tokenizers 0.23.3).
        """
        (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=False)
        if REPLACEMENT not in text or not self._byte_level:
            return text, None
        data = b"".join(self.bytes_of(id_) or b"" for id_ in ids)
        return text, None if data == text.encode() else list(data)

    @cached_property
    def _byte_level(self) -> bool:
        return isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    def bytes_of(self, id_: int) -> bytes | None:
        """The bytes that one id stands for; None where it stands for text, in a vocabulary that is not byte-level."""
        token = self.token_of(id_)
        if self._byte_level:  # one that is no byte-level spelling stands for itself, as in the decoder
            return bytes(_bytes_in(token) or token.encode())
        fallback = _BYTE_FALLBACK.fullmatch(token)
        return bytes([int(fallback[1], 16)]) if fallback else None

    def around(self, text: str) -> tuple[int, int]:
        """How many tokens the tokenizer puts before `text` and after it."""
        (encoding,) = self._tokenizer.encode_batch_fast([text])
        mask = encoding.special_tokens_mask
        before = next((at for at, added in enumerate(mask) if not added), len(mask))
        return before, next((at for at, added in enumerate(reversed(mask[before:])) if not added), 0)

    def token_of(self, id_: int) -> str:
        """How the vocabulary spells one id, as "\u0120None" for " None"; empty where it has no such id."""
        return self._tokenizer.id_to_token(id_) or ""

    @cached_property
    def special_tokens(self) -> dict[str, str | None]:
        """transformers' bos_token, eos_token, pad_token and unk_token; None where there is none that we know."""
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        found = {part: next((n for n in names if n in special), None) for part, names in _NAMES.items()}
        first = self.encode("a")[:1]
        if first != self.encode("a", special_tokens=False)[:1]:  # what it puts before a prompt is no guess
            found["bos_token"] = self.token_of(first[0])
        return {**found, "unk_token": getattr(self._tokenizer.model, "unk_token", None)}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which are no part of a generated text."""
        return frozenset(id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def eos_id(self) -> int | None:
        """The id that ends a text; None where no token is known to."""
        eos = self.special_tokens["eos_token"]
        return None if eos is None else self._tokenizer.token_to_id(eos)

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, known without tokenizing it, which costs 100 bytes per byte."""
        if not self._longest_token_bytes:
            return 1
        return -(-len(text.encode()) // self._longest_token_bytes)

    def _find_longest_token_bytes(self) -> int:
        """The most bytes of a text that one token can stand for; 0 where there is no such bound.

        There is one in byte-level BPE over all 256 bytes: every byte is in some token. A normalizer, an
        unknown token or an added token that takes the blanks beside it may each swallow any length.
        """
        tokenizer, added = self._tokenizer, self._tokenizer.get_added_tokens_decoder()
        tokens = tokenizer.get_vocab(with_added_tokens=False)
        every_byte_counts = (
            isinstance(tokenizer.decoder, decoders.ByteLevel)
            and tokenizer.normalizer is None
            and tokens.keys() >= _BYTE_OF_CHARACTER.keys()
            and not any(token.lstrip or token.rstrip for token in added.values())
        )
        if not every_byte_counts:
            return 0
        # A token of the model has one character per byte, an added one is its text.
        return max(max(map(len, tokens)), *(len(token.content.encode()) for token in added.values()), 1)

    def text_of(self, id_: int) -> tuple[str, list[int] | None]:
        """What one id decodes to; and its bytes, where these alone are not valid UTF-8."""
        if id_ not in self._texts:
            text = self._tokenizer.decode([id_], skip_special_tokens=False)
            self._texts[id_] = text, self._bytes_of(id_) if REPLACEMENT in text else None
        return self._texts[id_]

    def _bytes_of(self, id_: int) -> list[int] | None:
        token = self.token_of(id_)
        if fallback := _BYTE_FALLBACK.fullmatch(token):
            return [int(fallback[1], 16)]
        return _bytes_in(token)  # None: not a byte-level vocabulary, the token is its text
