"""The tokenizer of a folder in Hugging Face's layout. Called by load.py.

`tokenizer.json` is the tokenizer itself, in the format of the library `tokenizers`; `tokenizer_config.json` names the
tokens that begin and end a sequence, and may hold the chat template, which `chat_template.jinja` overrides. What these
mean is what transformers (5.x, `TokenizersBackend`) does with them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import tokenizers

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.text.tokenizer import ControlToken, Tokenizer
from octavo_engine.text.vocabulary import byte_level, sentencepiece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SENTENCEPIECE_STEPS: Final = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Build the tokenizer of the model in `folder`.

    Raises:
        ModelNotFound: there is no tokenizer.json.
        ModelInvalid: a file is corrupt.
        ModelUnsupported: tokens whose bytes are not known; names the decoder.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{folder} has no tokenizer.json; where there is a tokenizer.model or vocab.json, transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    description = _read_json(path)
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(folder, config)
    backend = _backend(path, description, named)
    added = backend.get_added_tokens_decoder()
    bos_id, eos_id = (backend.token_to_id(named[name]) if name in named else None for name in _NAMED_TOKENS[:2])
    adds_bos, adds_eos = _adds(backend, config, bos_id, eos_id)
    return Tokenizer(
        backend,
        backend_after_control=_without_prefix_space(path, description, named),
        token_bytes=_token_bytes(path, description, backend, {index: token.content for index, token in added.items()}),
        control_tokens={
            token.content: ControlToken(index, strips_before=token.lstrip, strips_after=token.rstrip)
            for index, token in added.items()
            if token.special and token.content
        },
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=_chat_template(folder, config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path} is no JSON: {error}") from error
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ModelInvalid(f"{path} holds no JSON object")
    return content


def _backend(path: Path, description: dict[str, Any], named: dict[str, str]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(_without_forgery(description)))
    except Exception as error:  # tokenizers raises no narrower one
        raise ModelInvalid(f"{path} is no tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [token for token in named.values() if token not in special and backend.token_to_id(token) is not None]
    )
    backend.encode_special_tokens = True  # takes them for text: the control tokens that count, Tokenizer cuts out
    return backend


def _without_forgery(description: dict[str, Any]) -> dict[str, Any]:
    """Leave out merges that make a control token of text, as transformers' conversions from SentencePiece have them."""
    model = description.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return description
    control = {token["content"] for token in description.get("added_tokens") or [] if token.get("special")}

    def result(merge: Any) -> str:
        return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)

    return description | {"model": model | {"merges": [one for one in model["merges"] if result(one) not in control]}}


def _without_prefix_space(
    path: Path, description: dict[str, Any], named: dict[str, str]
) -> tokenizers.Tokenizer | None:
    """Return the tokenizer for text after a control token, if it differs: a Metaspace that counts only at the start."""
    copy = json.loads(json.dumps(description))
    steps = [step for step in _steps(copy.get("pre_tokenizer")) if step.get("prepend_scheme") == "first"]
    for step in steps:
        step["prepend_scheme"] = "never"
    return _backend(path, copy, named) if steps else None


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Every step of a part of the pipeline, which may be a sequence of steps."""
    if not isinstance(part, dict):
        return
    yield part
    for inner in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
        yield from _steps(inner)


def _token_bytes(
    path: Path, description: dict[str, Any], backend: tokenizers.Tokenizer, added: dict[int, str]
) -> tuple[bytes, ...]:
    decode = _decoding(path, description)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        token_bytes[token_id] = added[token_id].encode() if token_id in added else decode(token)
    return tuple(token_bytes)


def _decoding(path: Path, description: dict[str, Any]) -> Callable[[str], bytes]:
    """What the tokens' bytes are follows from the decoder, which is a pipeline from tokens to text."""
    names = [str(step.get("type")) for step in _steps(description.get("decoder"))]
    kinds = set(names) - {"Sequence"}
    if "ByteLevel" in kinds:
        return byte_level
    if kinds and kinds <= _SENTENCEPIECE_STEPS:
        return sentencepiece
    what = ", ".join(names) or "none"
    raise ModelUnsupported(f"{path} has the decoder {what}; supported: ByteLevel, and those of SentencePiece models")


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The texts of the tokens with a role. A token is written as its text or as an object that has it."""
    source = config if any(name in config for name in _NAMED_TOKENS) else _read_json(folder / "special_tokens_map.json")
    named = {}
    for name in _NAMED_TOKENS:
        value = source.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[name] = text
    return named


def _adds(
    backend: tokenizers.Tokenizer, config: dict[str, Any], bos_id: int | None, eos_id: int | None
) -> tuple[bool, bool]:
    """Whether prompts get a beginning and an end: as the configuration says, else as the post-processor does it."""
    if "add_bos_token" in config or "add_eos_token" in config:
        return bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
    if backend.post_processor is None:
        return False, False
    around = backend.encode("", add_special_tokens=True).ids
    adds_bos = around[:1] == [bos_id]
    return adds_bos, around[adds_bos:][-1:] == [eos_id]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelInvalid(f"cannot read {path}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}.get(
            "default"
        )
    return template if isinstance(template, str) and template else None
