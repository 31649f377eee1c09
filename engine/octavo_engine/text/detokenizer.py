"""From token ids to text that can be shown at once: whole characters only.

One Detokenizer per answer, called by answer.py with each token; stop.py then looks for stop strings. However the tokens
are cut into updates, the concatenated text is the same: that is the property tests/engine/test_detokenizer.py holds. A
token costs its own bytes, however much text there is already.

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
    """Incremental decoding.

    Args:
        token_bytes: what each token id stands for; ids beyond are no text.
        hidden_ids: tokens that are no text (control tokens).
    """

    def __init__(self, token_bytes: Sequence[bytes], hidden_ids: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden_ids = hidden_ids
        # Bytes that are no UTF-8 become U+FFFD, one per maximal ill-formed subpart (Unicode, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens and return the characters that are complete now."""
        size = len(self._token_bytes)
        data = b"".join(
            self._token_bytes[token_id]
            for token_id in token_ids
            if token_id < size and token_id not in self._hidden_ids
        )
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what stands for a character that was begun and not completed; no more tokens come."""
        return self._utf8.decode(b"", final=True)
