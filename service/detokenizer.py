"""Token ids to text, token by token: no character comes before all of its bytes have."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from service.vocabulary import REPLACEMENT, Vocabulary

# Tokens before a text that its first ones may need: the bytes of a character (4 at most), a blank that a decoder drops
# at the start of all text.
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
        self._ids: list[int] = []  # of a vocabulary that is not byte-level: a window
        self._said = ""  # the text of the window, as far as it was given
        for id_ in before[-BEFORE:]:
            self.feed(id_)
        self._owes = finish

    def feed(self, id_: int) -> str:
        """The characters that `id_` completes."""
        self._owes = True
        if self._vocabulary.byte_level:
            return self._decoder.decode(self._vocabulary.bytes_of(id_))
        return self._feed_window(id_)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        if not self._owes:
            return ""
        if self._vocabulary.byte_level:
            return self._decoder.decode(b"", final=True)
        text, self._ids = self._text(), []
        return text[len(self._said) :]

    def _feed_window(self, id_: int) -> str:
        """As text-generation-inference does it: what a window's text has gained, unless it ends within a character."""
        self._ids.append(id_)
        text = self._text()
        unfinished = text.endswith(REPLACEMENT) and len(self._ids) < 2 * BEFORE
        if unfinished or len(text) <= len(self._said):
            return ""
        piece = text[len(self._said) :]
        self._ids = self._ids[-BEFORE // 2 :]
        self._said = self._text()
        return piece

    def _text(self) -> str:
        return self._vocabulary.decode(self._ids)[0]
