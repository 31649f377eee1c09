"""The tokenizer of a GGUF model, built from the file's own metadata.

Called by generation.py. Knows nothing about chat messages (template.py) or streaming (detokenizer.py).

Control tokens (`<|im_end|>`, `<|endoftext|>`) are the frame of a conversation, so whether a text may contain them is
the caller's decision and not the tokenizer's: `encode` takes segments, each of which says whether control tokens in it
count. template.py says no for what users wrote, so that nobody ends his own turn; a raw prompt says yes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import tokenizers
from tokenizers import models, pre_tokenizers

from octavo_engine.errors import ModelInvalid, ModelUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
        metadata: the key-value pairs of the GGUF header.

    Raises:
        ModelInvalid: a tokenizer entry is missing or contradicts another.
        ModelUnsupported: the tokenizer is of a kind that is not built yet.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        kind = _required(metadata, "tokenizer.ggml.model")
        if kind != "gpt2":
            raise ModelUnsupported(f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) is supported")
        pre = _required(metadata, "tokenizer.ggml.pre")
        if pre not in _PRE_TOKENIZERS:
            raise ModelUnsupported(f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(_PRE_TOKENIZERS))}")
        tokens: list[str] = list(_required(metadata, "tokenizer.ggml.tokens"))
        types: list[int] = list(_required(metadata, "tokenizer.ggml.token_type"))
        if len(types) != len(tokens):
            raise ModelInvalid(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "tokenizer.ggml.merges")]

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
        self.eos_token_id: int = _required(metadata, "tokenizer.ggml.eos_token_id")
        self.eos_token = tokens[self.eos_token_id]
        bos: int | None = metadata.get("tokenizer.ggml.bos_token_id")
        self.bos_token = "" if bos is None else tokens[bos]
        # What stands before every raw prompt. Chat templates write it themselves.
        self.prompt_prefix_ids: tuple[int, ...] = (
            (bos,) if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", False) else ()
        )

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

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        return self._bpe.encode(text, add_special_tokens=False).ids


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    try:
        return metadata[key]
    except KeyError:
        raise ModelInvalid(f"the GGUF header has no {key}") from None


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
