"""The headers of safetensors files: where each tensor lies. No torch here.

Called by models/checkpoint.py. It knows the file format and nothing about models. A truncated or hostile file ends in
ModelInvalid with the place at fault, and costs no more than its own size.

Format: https://github.com/huggingface/safetensors#format: eight bytes of length, that much JSON, the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeGuard

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.weights.gguf import TensorInfo
from octavo_engine.weights.quant_type import QuantType, RawType

if TYPE_CHECKING:
    from pathlib import Path

_TYPES = {"F32": QuantType.F32, "F16": QuantType.F16, "BF16": QuantType.BF16}
_RAW_TYPES = {raw_type.value: raw_type for raw_type in RawType}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class RawTensor:
    """As TensorInfo, of a tensor that is a part of a quantised matrix."""

    name: str
    path: Path
    shape: tuple[int, ...]
    raw_type: RawType
    offset: int
    num_bytes: int


def read_tensors(path: Path) -> dict[str, TensorInfo | RawTensor]:
    """The tensors in the safetensors file at `path`, by name.

    Raises:
        ModelNotFound: there is no such file.
        ModelInvalid: the file is truncated or corrupt; names the tensor where it is one's fault.
        ModelUnsupported: a tensor has a type that cannot be read; names it.
    """
    if not path.is_file():
        raise ModelNotFound(f"no model file at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ModelInvalid(
                f"{path.name}: its first bytes claim a header of {length} bytes, but the file has {size}: "
                "it is truncated or no safetensors file"
            )
        return parse_tensors(path, file.read(length), size)


def parse_tensors(path: Path, header: bytes, file_size: int) -> dict[str, TensorInfo | RawTensor]:
    """The same from the header's JSON, for a file of `file_size` bytes that need not be here.

    Raises:
        ModelInvalid: as read_tensors.
        ModelUnsupported: as read_tensors.
    """
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path.name}: the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ModelInvalid(f"{path.name}: the header is not a JSON object")
    data_start = _LENGTH_BYTES + len(header)
    return {
        name: _tensor(path, name, entry, data_start, file_size)
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _tensor(path: Path, name: str, entry: object, data_start: int, file_size: int) -> TensorInfo | RawTensor:
    def fail(problem: str) -> NoReturn:
        raise ModelInvalid(f"{path.name}: tensor {name}: {problem}")

    if not isinstance(entry, dict):
        fail("its entry is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        fail(f"dtype is {dtype!r}, not a string")
    if dtype not in _TYPES and dtype not in _RAW_TYPES:
        raise ModelUnsupported(
            f"{path.name}: tensor {name} has type {dtype}; supported: {' '.join((*_TYPES, *_RAW_TYPES))}"
        )
    if not _are_sizes(shape) or 0 in shape:
        fail(f"shape is {shape!r}, not a list of sizes above zero")
    if not _are_sizes(offsets) or len(offsets) != 2:
        fail(f"data_offsets is {offsets!r}, not two positions")
    num_bytes = math.prod(shape) * (_TYPES[dtype].block_bytes if dtype in _TYPES else _RAW_TYPES[dtype].num_bytes)
    start, end = (data_start + offset for offset in offsets)
    if end - start != num_bytes:
        fail(f"data at bytes {start} to {end} are not the {num_bytes} bytes that shape {shape} and {dtype} take")
    if end > file_size:
        fail(f"data at bytes {start} to {end} ends after the file, which has {file_size} bytes: it is truncated")
    if dtype in _RAW_TYPES:
        return RawTensor(name, path, tuple(shape), _RAW_TYPES[dtype], start, num_bytes)
    return TensorInfo(name, path, tuple(shape), _TYPES[dtype], start, num_bytes)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none below zero."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
