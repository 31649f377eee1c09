"""The header of a GGUF file: metadata and where each tensor lies. No torch here.

Called by the tokenizer (API process), by sizing.py and by the weight loader. It knows the file format and nothing about
models: which keys a model needs is the caller's business (`GGUFHeader.require`).

Every length in the file is checked against what is left of the file before anything is allocated for it, so that a
truncated or hostile file costs no more than its own size and ends in ModelInvalid with the place at fault.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import enum
import math
import mmap
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MetadataValue = bool | int | float | str | list["MetadataValue"]

_T = TypeVar("_T", int, float, str, bool, list[MetadataValue])

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ARRAY_DEPTH = 4  # no known key nests at all; bounds the recursion
_MAX_NAME_BYTES = 65535  # the specification's limit for keys; tensor names are shorter still


class QuantType(enum.IntEnum):
    """How a tensor's numbers are stored: the types of ggml that this engine can dequantise."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Numbers that share one scale and are stored together."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one such block."""
        return _BLOCKS[self][1]


_BLOCKS = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.BF16: (1, 2),
    QuantType.Q4_0: (32, 2 + 16),
    QuantType.Q4_1: (32, 2 + 2 + 16),
    QuantType.Q5_0: (32, 2 + 4 + 16),
    QuantType.Q5_1: (32, 2 + 2 + 4 + 16),
    QuantType.Q8_0: (32, 2 + 32),
}

# ggml's names of the types that are refused, so that the message can say more than a number.
_OTHER_TYPE_NAMES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model file."""

    name: str
    path: Path  # of the file
    shape: tuple[int, ...]  # outermost dimension first, as torch counts; the file has it the other way round
    quant_type: QuantType
    offset: int  # of the first byte, from the start of the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file but the tensors' data."""

    path: Path
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def require(self, key: str, kind: type[_T]) -> _T:
        """The value of `key`.

        Raises:
            ModelInvalid: there is no such key, or its value is not of `kind`.
        """
        if key not in self.metadata:
            raise ModelInvalid(f"{self.path.name}: metadata key {key} is missing")
        return self._typed(key, kind)

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        """The value of `key`, or `default` where the file does not have it.

        Raises:
            ModelInvalid: the value is not of `kind`.
        """
        return self._typed(key, kind) if key in self.metadata else default

    def _typed(self, key: str, kind: type[_T]) -> _T:
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelInvalid(f"{self.path.name}: metadata key {key} is {type(value).__name__}, not {kind.__name__}")
        return value


def read_header(path: Path) -> GGUFHeader:
    """Parse the header of the GGUF file at `path`.

    Raises:
        ModelNotFound: there is no such file.
        ModelInvalid: the file is no GGUF file, or is truncated or corrupt; names the key or tensor and the offset.
        ModelUnsupported: an unknown version, a big-endian file, or a tensor type that cannot be dequantised.
    """
    if not path.is_file():
        raise ModelNotFound(f"no model file at {path}")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise ModelInvalid(f"{path.name}: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderParser(path, data).parse()


class _ValueType(enum.IntEnum):
    """The type tag before each metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    _ValueType.UINT8: "B",
    _ValueType.INT8: "b",
    _ValueType.UINT16: "H",
    _ValueType.INT16: "h",
    _ValueType.UINT32: "I",
    _ValueType.INT32: "i",
    _ValueType.FLOAT32: "f",
    _ValueType.BOOL: "?",
    _ValueType.UINT64: "Q",
    _ValueType.INT64: "q",
    _ValueType.FLOAT64: "d",
}
_MIN_STRING_BYTES = 8  # its length
_MIN_ARRAY_BYTES = 12  # element type and count
_MIN_ENTRY_BYTES = _MIN_STRING_BYTES + 4 + 1  # key, type, the smallest value
_MIN_TENSOR_BYTES = _MIN_STRING_BYTES + 4 + 4 + 8  # name, number of dimensions (may be 0), type, offset


class _HeaderParser:
    """A cursor over the file that refuses to move past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._name = path.name
        self._path = path
        self._data = data
        self._size = len(data)
        self._pos = 0
        self._place = "header"  # what is being read: for messages

    def parse(self) -> GGUFHeader:
        if self._take(4) != _MAGIC:
            raise ModelInvalid(f"{self._name}: not a GGUF file (it does not start with {_MAGIC.decode()})")
        version = self._scalar("I")
        if version not in _VERSIONS:
            hint = " (a big-endian file?)" if int(version) & 0xFFFF == 0 else ""
            raise ModelUnsupported(f"{self._name}: GGUF version {version}{hint}; versions 2 and 3 can be read")
        num_tensors = self._count(_MIN_TENSOR_BYTES, "tensors")
        num_entries = self._count(_MIN_ENTRY_BYTES, "metadata entries")
        metadata: dict[str, MetadataValue] = {}
        for index in range(num_entries):
            self._place = f"metadata entry {index}"
            key = self._string(_MAX_NAME_BYTES)
            self._place = f"metadata key {key}"
            if key in metadata:
                self._fail("appears twice")
            metadata[key] = self._value(self._value_type(), depth=0)
        return GGUFHeader(self._path, metadata, self._tensors(num_tensors, self._alignment(metadata)))

    def _tensors(self, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            self._place = f"tensor {index}"
            name = self._string(_MAX_NAME_BYTES)
            self._place = f"tensor {name}"
            if name in relative:
                self._fail("appears twice")
            relative[name] = self._tensor_info(name)
        data_start = -(-self._pos // alignment) * alignment
        for tensor in relative.values():
            self._place = f"tensor {tensor.name}"
            if tensor.offset % alignment:
                self._fail(f"data offset {tensor.offset} is not a multiple of the alignment {alignment}")
            start, end = data_start + tensor.offset, data_start + tensor.offset + tensor.num_bytes
            if end > self._size:
                self._fail(f"data at bytes {start} to {end} ends after the file, which has {self._size} bytes")
        return {name: replace(tensor, offset=data_start + tensor.offset) for name, tensor in relative.items()}

    def _tensor_info(self, name: str) -> TensorInfo:
        """One entry, its offset still relative to the start of the data."""
        shape, quant_type, offset = self._shape(), self._quant_type(), int(self._scalar("Q"))
        row = shape[-1] if shape else 1
        if row % quant_type.block_size:
            self._fail(f"rows of {row} numbers do not divide into {quant_type.name} blocks of {quant_type.block_size}")
        num_bytes = math.prod(shape) // quant_type.block_size * quant_type.block_bytes
        return TensorInfo(name, self._path, shape, quant_type, offset, num_bytes)

    def _shape(self) -> tuple[int, ...]:
        num_dims = int(self._scalar("I"))
        if num_dims > _MAX_DIMS:
            self._fail(f"has {num_dims} dimensions, more than {_MAX_DIMS}")
        dims = tuple(int(self._scalar("Q")) for _ in range(num_dims))
        if any(dim == 0 for dim in dims):
            self._fail(f"has an empty dimension: {dims}")
        return dims[::-1]

    def _quant_type(self) -> QuantType:
        number = int(self._scalar("I"))
        try:
            return QuantType(number)
        except ValueError:
            kind = _OTHER_TYPE_NAMES.get(number, f"number {number}")
            known = " ".join(member.name for member in QuantType)
            raise ModelUnsupported(
                f"{self._name}: {self._place} has type {kind}, which cannot be dequantised; supported: {known}"
            ) from None

    def _alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        self._place = "metadata key general.alignment"
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment % 8:
            self._fail(f"is {alignment!r}, not a positive multiple of 8")
        return alignment

    def _value_type(self) -> _ValueType:
        number = int(self._scalar("I"))
        if number > max(_ValueType):
            self._fail(f"has unknown value type {number}")
        return _ValueType(number)

    def _value(self, value_type: _ValueType, depth: int) -> MetadataValue:
        if value_type is _ValueType.STRING:
            return self._string(self._size)
        if value_type is _ValueType.ARRAY:
            return self._array(depth)
        return self._scalar(_SCALARS[value_type])

    def _array(self, depth: int) -> list[MetadataValue]:
        if depth == _MAX_ARRAY_DEPTH:
            self._fail(f"nests arrays deeper than {_MAX_ARRAY_DEPTH}")
        element = self._value_type()
        if element is _ValueType.STRING:
            return [self._string(self._size) for _ in range(self._count(_MIN_STRING_BYTES, "strings"))]
        if element is _ValueType.ARRAY:
            return [self._array(depth + 1) for _ in range(self._count(_MIN_ARRAY_BYTES, "arrays"))]
        code = _SCALARS[element]
        width = struct.calcsize("<" + code)
        count = self._count(width, "numbers")
        return list(struct.unpack(f"<{count}{code}", self._take(count * width)))

    def _string(self, max_bytes: int) -> str:
        length = self._count(1, "bytes in a string")
        if length > max_bytes:
            self._fail(f"has a name of {length} bytes")
        start = self._pos
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            self._pos = start
            self._fail(f"is not UTF-8 ({error.reason})")

    def _scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _count(self, min_bytes_each: int, what: str) -> int:
        """A 64-bit count that is followed by at least that many things: never more than the file can hold."""
        count = int(self._scalar("Q"))
        if count * min_bytes_each > self._size - self._pos:
            self._fail(f"claims {count} {what}, more than the {self._size - self._pos} bytes left in the file")
        return count

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self._pos:
            self._fail(f"the file ends after {self._size} bytes: it is truncated")
        taken = self._data[self._pos : self._pos + num_bytes]
        self._pos += num_bytes
        return taken

    def _fail(self, problem: str) -> NoReturn:
        raise ModelInvalid(f"{self._name}: {self._place}: {problem} (at byte {self._pos})")
