"""What a model is, in Ollama's words: the objects that /api/tags, /api/ps and /api/show tell of it.

Reads the header of its file or folder, once for each state of it. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from octavo_engine.models.checkpoint import CONFIG_FILE, POOLING_FILE
from octavo_engine.planning import read_model
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.template import ChatTemplate
from octavo_engine.weights.gguf import part_paths, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MAX_LISTED: Final = 16  # longer lists of metadata (the vocabulary) are told only if asked for

# general.file_type of GGUF (llama.cpp's llama_ftype). Other models are named by how most of their numbers are stored.
_FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 30: "IQ4_XS",
    32: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Description:
    """A model's file or folder."""

    digest: str  # another one when the file changes; not of its bytes, which would take minutes to read
    num_bytes: int
    modified_at: str
    details: dict[str, Any]
    template: str  # jinja2; empty: none
    license: str
    model_info: dict[str, Any]


def describe(path: Path) -> Description:
    """Describe the model at `path`.

    Raises:
        ModelNotFound, ModelInvalid, ModelUnsupported: it is no model that this engine can run.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else list(part_paths(path))
    status = [file.stat() for file in files]
    num_bytes = sum(one.st_size for one in status)
    return _describe(path, num_bytes, max((one.st_mtime_ns for one in status), default=0))


@lru_cache(maxsize=64)
def _describe(path: Path, num_bytes: int, modified_ns: int) -> Description:
    model = read_model(path)
    if path.is_dir():
        info: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        quantization, text_license = model.quantization, ""
    else:
        header = read_header(path)
        info = dict(header.metadata)
        quantization = _FILE_TYPES.get(header.get("general.file_type", int, -1), model.quantization)
        text_license = header.get("general.license", str, "")
    architecture = model.checkpoint.architecture
    info |= {"general.architecture": architecture, "general.parameter_count": model.checkpoint.num_parameters}
    identity = json.dumps([str(path.resolve()), num_bytes, modified_ns])
    return Description(
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        num_bytes=num_bytes,
        modified_at=datetime.fromtimestamp(modified_ns / 1e9, UTC).isoformat().replace("+00:00", "Z"),
        details={
            "parent_model": "",
            "format": "safetensors" if path.is_dir() else "gguf",
            "family": architecture,
            "families": [architecture],
            "parameter_size": _human(model.checkpoint.num_parameters),
            "quantization_level": quantization,
        },
        template=load_tokenizer(path).chat_template or "",
        license=text_license,
        model_info=info,
    )


def capabilities(path: Path, *, template: str = "", chat_template: str = "") -> list[str]:
    """Return what the model at `path` can do, in Ollama's words.

    Args:
        path: of the model; `describe` tells what it raises.
        template: in Go's language, in place of the model's own.
        chat_template: in jinja2, in place of either.
    """
    description = describe(path)
    if (path / POOLING_FILE).exists() or any(name.endswith(".pooling_type") for name in description.model_info):
        return ["embedding"]  # made for nothing else
    source = chat_template or template or description.template
    language: Literal["jinja2", "go"] = "go" if template and not chat_template else "jinja2"
    return ["completion", *_capabilities_of_chat(path, description.digest, source, language)]


@lru_cache(maxsize=64)
def _capabilities_of_chat(path: Path, _state: str, source: str, language: Literal["jinja2", "go"]) -> tuple[str, ...]:
    if not source:
        return ()
    template = ChatTemplate(source, load_tokenizer(path), language)
    can_call = template.takes_tools and template.tool_format is not None
    return (*(["tools"] if can_call else []), *(["thinking"] if template.thinks else []))


def model_info(description: Description, *, verbose: bool) -> dict[str, Any]:
    """Return the metadata; without `verbose` long lists are null, as Ollama has it."""
    return {
        key: None if isinstance(value, list) and len(value) > _MAX_LISTED and not verbose else value
        for key, value in description.model_info.items()
    }


def _human(number: int) -> str:
    """Ollama's way to write how many parameters a model has: 134.52M, 8B, 1.5B."""
    for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if number >= size:
            return f"{number / size:.0f}{unit}" if number % size == 0 else f"{number / size:.{digits}f}{unit}"
    return str(number)
