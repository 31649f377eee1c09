"""From token ids to text that can be shown at once: whole characters only, nothing that may still become a stop string.

One Detokenizer per request, called by generation.py with each update of the engine. However the tokens are cut into
updates, the concatenated text is the same: that is the property tests/engine/test_detokenizer.py holds. A token costs
its own bytes, however much text there is already.

An answer goes on where its prompt ended, so a first token that begins with a space gives that space: prompt and answer
together read as the model wrote them. (transformers, which decodes the answer alone, drops it in SentencePiece
vocabularies; vLLM and llama.cpp keep it.)
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


class Detokenizer:
    """Incremental decoding with stop strings.

    Args:
        token_bytes: what each token id stands for; ids beyond are no text.
        hidden_ids: tokens that are no text (control tokens).
        stop: strings that end the text. Of several, the one that is complete first counts, and of those complete at the
            same character the longest. It is not part of the text.
    """

    def __init__(self, token_bytes: Sequence[bytes], hidden_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._hidden_ids = hidden_ids
        self._stop = stop
        # Bytes that are no UTF-8 become U+FFFD, one per maximal ill-formed subpart (Unicode, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False  # a stop string was found: there will be no more text

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens and return the text that is certain now."""
        size = len(self._token_bytes)
        data = b"".join(
            self._token_bytes[token_id]
            for token_id in token_ids
            if token_id < size and token_id not in self._hidden_ids
        )
        return self._release(self._utf8.decode(data))

    def finish(self) -> str:
        """Return what was held back; no more tokens come."""
        text = self._release(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if not self._stop:
            return text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        certain = len(text) - keep
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
