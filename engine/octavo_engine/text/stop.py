"""Stop strings in a text that comes in pieces: what is certain goes on at once, what may become one is held back.

One StopStrings per answer, between detokenizer.py and whoever shows the text (generation.py). It knows characters, and
nothing of tokens: a stop string may begin in one token and end in another. However the text is cut into pieces, what
comes out is the same in sum: that is the property tests/engine/test_stop.py holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """Finds where a text ends.

    Args:
        strings: none of them empty. The one that is complete first counts, and of those complete at the same character
            the longest.
        include: the stop string is the end of the text; else it is no part of it.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = strings
        self._include = include
        self._held = ""  # it may be the beginning of a stop string
        self.found = False  # there will be no more text

    def push(self, new: str) -> str:
        """Take the next piece and return the text that is certain now."""
        if self.found:
            return ""
        if not self._strings:
            return new
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._strings if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            end, start = min(ends)
            return text[: end if self._include else start]
        certain = len(text) - max(_overlap(text, stop) for stop in self._strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back; no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
