"""Text to token ids and back to bytes, whatever kind of model file the vocabulary came from.

Made by load.py (gguf_tokenizer.py and hf_tokenizer.py build the parts); used by generation.py. Knows nothing about chat
messages (template.py) or streaming (detokenizer.py).

Control tokens (`<|im_end|>`, `<|endoftext|>`) are the frame of a conversation, so whether a text may contain them is
the caller's decision and not the tokenizer's: `encode` takes segments, each of which says whether control tokens in it
count. template.py says no for what users wrote, so that nobody ends his own turn; a raw prompt says yes. (vLLM and
transformers read them in both.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.errors import ModelInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import tokenizers


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text to encode."""

    text: str
    control_tokens: bool  # recognise control tokens in it; False: they are ordinary characters


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that is no text but part of a conversation's frame."""

    token_id: int
    strips_before: bool = False  # takes the white space before it away
    strips_after: bool = False


class Tokenizer:
    """A vocabulary with its rules.

    Args:
        backend: encodes text without control tokens, at the beginning of a prompt.
        backend_after_control: the same after a control token, where some kinds leave out the space that they put before
            a prompt; None: no difference.
        token_bytes: by id, what the token stands for in a text. Ids beyond stand for nothing: a model's output can be
            wider than its vocabulary.
        control_tokens: by their text.
        hidden_ids: other tokens that are no text in an answer: unused and unknown ones.
        bos_id: the token at the beginning of a sequence, if there is one.
        eos_id: the token that ends a turn, if there is one.
        adds_bos: the model wants `bos_id` before every raw prompt. Chat templates write it themselves.
        adds_eos: the model wants `eos_id` after every raw prompt.
        chat_template: jinja2 source out of the model, if it brings one.

    Raises:
        ModelInvalid: the control tokens cannot be searched for.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        backend_after_control: tokenizers.Tokenizer | None = None,
        token_bytes: tuple[bytes, ...],
        control_tokens: Mapping[str, ControlToken],
        hidden_ids: frozenset[int] = frozenset(),
        bos_id: int | None,
        eos_id: int | None,
        adds_bos: bool,
        adds_eos: bool,
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self._backend_after_control = backend_after_control or backend
        self._control_tokens = control_tokens
        self.token_bytes = token_bytes
        self.max_token_bytes = max(map(len, token_bytes), default=0) or 1
        self.control_ids = hidden_ids | {token.token_id for token in control_tokens.values()}
        try:
            pattern = re.compile(_any_of(sorted(control_tokens))) if control_tokens else None
        except RecursionError:
            longest = max(map(len, control_tokens))
            raise ModelInvalid(f"the longest control token has {longest} characters, which is too long") from None
        self.control_pattern: re.Pattern[str] | None = pattern
        self.bos_token = "" if bos_id is None else token_bytes[bos_id].decode(errors="replace")
        self.eos_token = "" if eos_id is None else token_bytes[eos_id].decode(errors="replace")
        self.prompt_prefix_ids = (bos_id,) if adds_bos and bos_id is not None else ()
        self.prompt_suffix_ids = (eos_id,) if adds_eos and eos_id is not None else ()
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        return len(self.token_bytes)

    def control_ids_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Return the ids of those texts that are control tokens."""
        return {text: self._control_tokens[text].token_id for text in texts if text in self._control_tokens}

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Return the token ids of the segments, in order. Nothing is added before or after.

        Only control tokens part the text: where two segments meet, a token may stand for characters of both.
        """
        ids: list[int] = []
        backend = self._backend
        plain, strips = "", False
        for text, token in self._runs(segments):
            plain += text
            if token is None:
                continue
            ids += _encode(backend, _strip(plain, before=strips, after=token.strips_before))
            ids.append(token.token_id)
            backend = self._backend_after_control
            plain, strips = "", token.strips_after
        return ids + _encode(backend, _strip(plain, before=strips, after=False))

    def _runs(self, segments: Iterable[Segment]) -> Iterator[tuple[str, ControlToken | None]]:
        """Each stretch of plain text, with the control token that ends it if one does."""
        for segment in segments:
            position = 0
            if segment.control_tokens and self.control_pattern is not None:
                for match in self.control_pattern.finditer(segment.text):
                    yield segment.text[position : match.start()], self._control_tokens[match.group()]
                    position = match.end()
            yield segment.text[position:], None


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids if text else []


def _strip(text: str, *, before: bool, after: bool) -> str:
    text = text.lstrip() if before else text
    return text.rstrip() if after else text


def _any_of(words: list[str]) -> str:
    """Return a regular expression for the longest of these (sorted) words that stands at a place.

    A tree of their beginnings, so that a place costs no more than the longest word, however many words there are: users
    choose the text that this is matched with.
    """
    alternatives = []
    rest = [word for word in words if word]
    while rest:
        first = rest[0][0]
        group = [word[1:] for word in rest if word[0] == first]
        rest = rest[len(group) :]
        tail = _any_of(group)
        optional = "?" if "" in group and tail else ""
        alternatives.append(re.escape(first) + (f"(?:{tail}){optional}" if "|" in tail or optional else tail))
    return "|".join(alternatives)
