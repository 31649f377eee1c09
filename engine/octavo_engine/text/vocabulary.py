"""What the tokens of a vocabulary stand for: the two ways of writing bytes and spaces in them.

Called by gguf_tokenizer.py and hf_tokenizer.py.
"""

from __future__ import annotations

import re
from typing import Final

SPACE: Final = "\u2581"  # SentencePiece's sign for a space
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet of byte-level vocabularies: printable characters that stand for bytes.

    Printable Latin-1 bytes are written as themselves, the others, in order, as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_of_char()


def byte_level(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # not written in the byte alphabet, so it stands for its own text
        return token.encode()


def sentencepiece(token: str) -> bytes:
    """What a piece of a SentencePiece vocabulary stands for; `<0x0A>` is a byte."""
    match = _BYTE.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token.replace(SPACE, " ").encode()
