"""The tokenizer of a GGUF model, built from the file's own metadata.

Called by generation.py. Knows nothing about chat messages (template.py) or streaming (detokenizer.py).

Control tokens (`<|im_end|>`, `<|endoftext|>`) are the frame of a conversation, so whether a text may contain them is
the caller's decision and not the tokenizer's: `encode` takes segments, each of which says whether control tokens in it
count. template.py says no for what users wrote, so that nobody ends his own turn; a raw prompt says yes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import tokenizers
from tokenizers import models, pre_tokenizers

from octavo_engine.errors import ModelInvalid, ModelUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo_engine.weights.gguf import GGUFHeader

_T = TypeVar("_T")

# Values of tokenizer.ggml.token_type (gguf specification, "tokenizer.ggml.token_type").
_CONTROL: Final = 3
_USER_DEFINED: Final = 4


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# tokenizer.ggml.pre -> how text is cut before byte-pair merging. The names are llama.cpp's. A wrong cut gives other
# tokens than the model was trained on without any error, so a name that is not here is refused.
_PRE_TOKENIZERS: Final = {"gpt-2": _gpt2, "smollm": _smollm}


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text to encode."""

    text: str
    control_tokens: bool  # recognise control tokens in it; False: they are ordinary characters


class Tokenizer:
    """Byte-level BPE.

    Args:
        header: of the GGUF file.

    Raises:
        ModelInvalid: a tokenizer entry is missing or contradicts another.
        ModelUnsupported: the tokenizer is of a kind that is not built yet.
    """

    def __init__(self, header: GGUFHeader) -> None:
        kind = header.require("tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise ModelUnsupported(f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) is supported")
        pre = header.require("tokenizer.ggml.pre", str)
        if pre not in _PRE_TOKENIZERS:
            raise ModelUnsupported(f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(_PRE_TOKENIZERS))}")
        tokens = _array(header, "tokenizer.ggml.tokens", str)
        types = _array(header, "tokenizer.ggml.token_type", int)
        if len(types) != len(tokens):
            raise ModelInvalid(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        merges = [_pair(merge) for merge in _array(header, "tokenizer.ggml.merges", str)]

        ids = {token: token_id for token_id, token in enumerate(tokens)}
        try:
            self._bpe = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
        except Exception as error:  # tokenizers raises no narrower one
            raise ModelInvalid(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
        self._bpe.pre_tokenizer = _PRE_TOKENIZERS[pre]()
        # User-defined tokens are whole wherever they stand, control tokens only where the caller says so (`encode`).
        self._bpe.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == _USER_DEFINED
            ]
        )
        self._control_ids = {
            token: token_id
            for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
            if token_type == _CONTROL
        }
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self.control_pattern: re.Pattern[str] | None = (
            re.compile("|".join(re.escape(token) for token in longest_first)) if longest_first else None
        )

        raw = {_CONTROL, _USER_DEFINED}
        self.token_bytes: tuple[bytes, ...] = tuple(
            token.encode() if token_type in raw else _to_bytes(token)
            for token, token_type in zip(tokens, types, strict=True)
        )  # by id: what the token stands for in the text
        self.control_ids = frozenset(self._control_ids.values())
        self.max_token_bytes = max(map(len, self.token_bytes))
        self.eos_token = self._token(header, "tokenizer.ggml.eos_token_id")
        self.bos_token = self._token(header, "tokenizer.ggml.bos_token_id")
        # What stands before every raw prompt. Chat templates write it themselves.
        add_bos = header.get("tokenizer.ggml.add_bos_token", bool, default=False)
        self.prompt_prefix_ids = (header.require("tokenizer.ggml.bos_token_id", int),) if add_bos else ()

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        return len(self.token_bytes)

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Return the token ids of the segments, in order. Nothing is added before or after."""
        ids: list[int] = []
        for segment in segments:
            if not segment.control_tokens or self.control_pattern is None:
                ids += self._encode_plain(segment.text)
                continue
            position = 0
            for match in self.control_pattern.finditer(segment.text):
                ids += self._encode_plain(segment.text[position : match.start()])
                ids.append(self._control_ids[match.group()])
                position = match.end()
            ids += self._encode_plain(segment.text[position:])
        return ids

    def _token(self, header: GGUFHeader, key: str) -> str:
        """Return the text of the token whose id is under `key`, or nothing where the header has no such token."""
        token_id = header.get(key, int, -1)
        if token_id >= self.vocab_size:
            raise ModelInvalid(f"{key} is {token_id}, and there are {self.vocab_size} tokens")
        return self.token_bytes[token_id].decode(errors="replace") if token_id >= 0 else ""

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        return self._bpe.encode(text, add_special_tokens=False).ids


def _array(header: GGUFHeader, key: str, kind: type[_T]) -> list[_T]:
    elements = header.require(key, list)
    typed: list[_T] = [element for element in elements if isinstance(element, kind)]
    if len(typed) != len(elements):
        raise ModelInvalid(f"{key} has elements that are not {kind.__name__}")
    return typed


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet of byte-level vocabularies: printable characters that stand for bytes.

    Printable Latin-1 bytes are written as themselves, the others, in order, as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_of_char()


def _to_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # not written in the byte alphabet, so it stands for its own text
        return token.encode()
