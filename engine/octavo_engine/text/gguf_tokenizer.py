"""The tokenizer in the metadata of a GGUF file. Called by load.py.

Two kinds (`tokenizer.ggml.model`): `gpt2`, byte-level BPE with a table of merges, whose way to cut a text into words is
told by a name only (`tokenizer.ggml.pre`); and `llama`, SentencePiece's BPE, with scores in place of merges, spaces
written as U+2581, and a token for every byte to fall back on. Keys: the GGUF specification, section Tokenizer;
defaults where a key is missing: llama.cpp's (llama-vocab.cpp). The rules for text are those of the models' own
tokenizers as transformers has them, also where llama.cpp's differ (Qwen's NFC, Mistral's upper case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.text.tokenizer import ControlToken, Tokenizer
from octavo_engine.text.vocabulary import SPACE, byte_level, sentencepiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo_engine.weights.gguf import GGUFHeader

_T = TypeVar("_T")

# Values of tokenizer.ggml.token_type (gguf specification, "tokenizer.ggml.token_type").
_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_UNUSED: Final = 5
_BYTE: Final = 6


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a byte-level vocabulary wants a text to be cut before merging."""

    patterns: tuple[str, ...]  # each cuts the pieces that the one before left; matches and gaps are pieces
    whole_words: bool = False  # a piece that is a token is that token, whatever the merges say
    adds_bos: bool = False  # where the file does not say
    nfc: bool = False  # the text is brought into Unicode's normal form C before


_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_THEN_GPT2: Final = _Cut((r"\p{N}", _GPT2))
_GPT4: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3: Final = _Cut((_GPT4.format(digits="{1,3}"),), whole_words=True, adds_bos=True)
_QWEN2: Final = _Cut((_GPT4.format(digits=""),), nfc=True)
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> the cut. The names are llama.cpp's. A wrong cut gives other tokens than the model was trained on
# without any error, so a name that is not here is refused.
_CUTS: Final = {
    "default": _Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Cut((_GPT2,)),
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": _Cut(_LLAMA3.patterns),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Cut((_TEKKEN,), whole_words=True, adds_bos=True),
}


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer:
    """Build the tokenizer that the header describes.

    Raises:
        ModelInvalid: a tokenizer entry is missing or contradicts another.
        ModelUnsupported: the tokenizer is of a kind that cannot be built; names it.
    """
    kind = header.require("tokenizer.ggml.model", str)
    if kind == "gpt2":
        return _byte_level_bpe(header)
    if kind == "llama":
        return _sentencepiece_bpe(header)
    raise ModelUnsupported(
        f"tokenizer.ggml.model is {kind!r}; supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The vocabulary as the file lists it, by id."""

    texts: list[str]
    types: list[int]

    @classmethod
    def read(cls, header: GGUFHeader) -> _Tokens:
        texts = _array(header, "tokenizer.ggml.tokens", str)
        if not texts:
            raise ModelInvalid("tokenizer.ggml.tokens is empty")
        types = _array(header, "tokenizer.ggml.token_type", int)
        if len(types) != len(texts):
            raise ModelInvalid(f"tokenizer.ggml.token_type has {len(types)} entries for {len(texts)} tokens")
        return cls(texts, types)

    def ids(self, *types: int) -> dict[str, int]:
        """The tokens of these types; of equal ones the last."""
        pairs = enumerate(zip(self.texts, self.types, strict=True))
        return {text: token_id for token_id, (text, token_type) in pairs if token_type in types}

    def bytes(self, decode: Callable[[str], bytes]) -> tuple[bytes, ...]:
        """What each token stands for; `decode` tells it of those that are not written as themselves."""
        return tuple(
            decode(text) if token_type in (_NORMAL, _BYTE) else b"" if token_type == _UNUSED else text.encode()
            for text, token_type in zip(self.texts, self.types, strict=True)
        )


def _byte_level_bpe(header: GGUFHeader) -> Tokenizer:
    name = header.get("tokenizer.ggml.pre", str, "")
    cut = _CUTS.get(name)
    if cut is None:
        what = f"is {name!r}" if name else "is missing"
        raise ModelUnsupported(
            f"tokenizer.ggml.pre {what}, so how to cut a text is not known; supported: {', '.join(sorted(_CUTS))}. "
            "Convert the model again, or give a folder with its tokenizer.json by --tokenizer"
        )
    tokens = _Tokens.read(header)
    merges = [_pair(merge) for merge in _array(header, "tokenizer.ggml.merges", str)]
    vocabulary = tokens.ids(_NORMAL, _USER_DEFINED)
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole_words))
    except Exception as error:  # tokenizers raises no narrower one
        raise ModelInvalid(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _finish(header, tokens, backend, tokens.bytes(byte_level), adds_bos=cut.adds_bos)


def _sentencepiece_bpe(header: GGUFHeader) -> Tokenizer:
    if header.get("tokenizer.ggml.remove_extra_whitespaces", bool, default=False):
        raise ModelUnsupported("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    tokens = _Tokens.read(header)
    scores = _array(header, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens.texts):
        raise ModelInvalid(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens.texts)} tokens")
    unknown = next(iter(tokens.ids(_UNKNOWN)), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=tokens.ids(_NORMAL, _USER_DEFINED, _BYTE, _UNKNOWN),
            merges=_merges(tokens.ids(_NORMAL), scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    # Before the text, and again after each control token, as llama.cpp and the `legacy` tokenizers of transformers do.
    add_space = header.get("tokenizer.ggml.add_space_prefix", bool, default=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if add_space else spaces
    return _finish(header, tokens, backend, tokens.bytes(sentencepiece), adds_bos=True)


def _merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that make a piece, the best score first.

    SentencePiece merges whichever neighbours make the piece of the highest score. It never makes control, unknown or
    byte tokens of a text, and user-defined ones are cut out before.
    """
    pairs = [
        (-scores[token_id], -cut, piece[:cut], piece[cut:])
        for piece, token_id in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _finish(
    header: GGUFHeader,
    tokens: _Tokens,
    backend: tokenizers.Tokenizer,
    token_bytes: tuple[bytes, ...],
    *,
    adds_bos: bool,
) -> Tokenizer:
    # User-defined tokens are whole wherever they stand, control tokens only where the caller says so.
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in tokens.ids(_USER_DEFINED) if text])
    control = tokens.ids(_CONTROL, _UNKNOWN)
    return Tokenizer(
        backend,
        token_bytes=token_bytes,
        control_tokens={text: ControlToken(token_id) for text, token_id in control.items() if text},
        hidden_ids=frozenset(tokens.ids(_UNUSED).values()),
        bos_id=_token_id(header, "bos", len(token_bytes)),
        eos_id=_token_id(header, "eos", len(token_bytes)),
        adds_bos=_adds(header, "bos", default=adds_bos),
        adds_eos=_adds(header, "eos", default=False),
        chat_template=header.get("tokenizer.chat_template", str, "") or None,
    )


def _token_id(header: GGUFHeader, which: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{which}_token_id"
    if key not in header.metadata:
        return None
    token_id = header.require(key, int)
    if not 0 <= token_id < vocab_size:
        raise ModelInvalid(f"{key} is {token_id}, and there are {vocab_size} tokens")
    return token_id


def _adds(header: GGUFHeader, which: str, *, default: bool) -> bool:
    adds = header.get(f"tokenizer.ggml.add_{which}_token", bool, default)
    if adds and f"tokenizer.ggml.add_{which}_token" in header.metadata:
        header.require(f"tokenizer.ggml.{which}_token_id", int)
    return adds


def _array(header: GGUFHeader, key: str, kind: type[_T]) -> list[_T]:
    elements = header.require(key, list)
    typed: list[_T] = [element for element in elements if isinstance(element, kind)]
    if len(typed) != len(elements):
        raise ModelInvalid(f"{key} has elements that are not {kind.__name__}")
    return typed


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
