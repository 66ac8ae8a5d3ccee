"""Finds stop strings in a text that comes in pieces, and keeps back what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """The text up to the first stop string.

    First is the one that is complete first, as if the text came character by character; of several that end there,
    the longest. So it does not matter how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops  # none of them empty
        self._kept = ""
        self.found: str | None = None  # the stop string, once it is complete

    def feed(self, piece: str) -> str:
        """What can be said of the text now; nothing more comes once one is `found`."""
        if not self._stops:
            return piece
        text = self._kept + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._kept = ""
            return text[:at]
        known = next((at for at in range(len(text)) if self._may_start(text[at:])), len(text))
        self._kept = text[known:]
        return text[:known]

    def flush(self) -> str:
        """What was kept back, at the end of the text."""
        kept, self._kept = self._kept, ""
        return kept

    def _may_start(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
