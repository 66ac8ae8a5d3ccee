"""Token ids to text, token by token: no character comes before all of its bytes have."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from service.vocabulary import Vocabulary

# Tokens before a text that may matter to it: a character has 4 bytes at most, and a token at least one.
BEFORE = 8


class Detokenizer:
    """The text after the tokens `before`, in pieces; joined they are the text, with U+FFFD for what is no UTF-8.

    Args:
        before: ids whose text came already, but for the bytes of a character that they leave unfinished.
        finish: whether `flush` gives these where nothing came after them.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = (), *, finish: bool = False) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: list[int] = []  # the id before, if any
        for id_ in before[-BEFORE:]:
            self.feed(id_)
        self._owes = finish

    def feed(self, id_: int) -> str:
        """The characters that `id_` completes."""
        self._owes = True
        before, self._last = self._last, [id_]
        data = self._vocabulary.bytes_of(id_)
        if data is not None:
            return self._decoder.decode(data)
        # Not alone: a decoder may drop the blank at the start of all text.
        text = self._vocabulary.decode([*before, id_])[0]
        return self.flush() + text[len(self._vocabulary.decode(before)[0]) :]

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True) if self._owes else ""
