"""The header of a GGUF model, in one file or in parts: metadata and where each tensor lies. No torch here.

Called by the tokenizer (API process), by sizing.py and by the weight loader. It knows the file format and nothing about
models: which keys a model needs is the caller's business (`GGUFHeader.require`).

Every length in the file is checked against what is left of the file and against the bounds below before anything is
allocated for it. So a truncated or hostile file ends in ModelInvalid with the place at fault, after seconds and some
hundred MB at worst, however large it is.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Parts: the names
`...-00001-of-00003.gguf` and the metadata keys split.* of llama.cpp's gguf-split.
"""

from __future__ import annotations

import enum
import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.weights.quant_type import OTHER_TYPE_NAMES, QuantType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path, PurePath

MetadataValue = bool | int | float | str | list["MetadataValue"]

_PathT = TypeVar("_PathT", bound="PurePath")
_T = TypeVar("_T", int, float, str, bool, list[MetadataValue])

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ARRAY_DEPTH = 4  # no known key nests at all; bounds the recursion
_MAX_NAME_BYTES = 65535  # the specification's limit for keys; tensor names are shorter still
# Bounds on what is allocated for a header. The largest known ones, with vocabularies of 262,144 tokens and as many
# merges, have 20 MB and 1.3 million elements.
_MAX_HEADER_BYTES = 128 << 20
_MAX_ARRAY_ELEMENTS = 1 << 22  # in all arrays together
_ARRAY_COST = 64  # an array within an array takes as much time as so many elements
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 17
_PART_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model."""

    name: str
    path: Path  # the file that it lies in; the tensors of a split model lie in several
    shape: tuple[int, ...]  # outermost dimension first, as torch counts; the file has it the other way round
    quant_type: QuantType
    offset: int  # of the first byte, from the start of that file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def stored_as(self) -> str:
        """For people."""
        return self.quant_type.name


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF model but the tensors' data."""

    path: Path  # the file; of a split model its first part
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
    """Parse the header of the GGUF file at `path`; of a split model, whichever part `path` is, those of all parts.

    Raises:
        ModelNotFound: there is no such file, or a part is missing; names it.
        ModelInvalid: a file is no GGUF file, or is truncated or corrupt; names the key or tensor and the offset.
        ModelUnsupported: an unknown version, a big-endian file, or a tensor type that cannot be dequantised.
    """
    paths = part_paths(path)
    if len(paths) == 1:
        header = read_part(path)
        if (count := header.get("split.count", int, 1)) > 1:
            number = header.get("split.no", int, 0) + 1
            raise ModelInvalid(
                f"{path.name}: this is part {number} of {count} of a split model, which cannot be found by this name; "
                f"name it ...-{number:05}-of-{count:05}.gguf beside the others"
            )
        return header
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelNotFound(f"part {missing[0]}{others} of a model of {len(paths)} parts is not in {path.parent}")
    return _join([read_part(part) for part in paths])


def part_paths(path: _PathT) -> tuple[_PathT, ...]:
    """All files of the model that `path` is of, by its name alone: itself, or every part of a split model in order."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) < 2 or not 1 <= int(match["number"]) <= int(match["count"]):
        return (path,)
    stem, count = match["stem"], match["count"]
    return tuple(path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1))


def _join(parts: list[GGUFHeader]) -> GGUFHeader:
    """One header of all parts: the first one's metadata and everyone's tensors."""
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        for key, expected in (("split.no", index), ("split.count", len(parts))):
            if part.require(key, int) != expected:
                raise ModelInvalid(
                    f"{part.path.name}: metadata key {key} is {part.metadata[key]}, but the file's name says {expected}"
                )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ModelInvalid(f"{part.path.name}: tensor {name} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    first = parts[0]
    expected = first.get("split.tensors.count", int, len(tensors))
    if len(tensors) != expected:
        raise ModelInvalid(
            f"{first.path.name}: metadata key split.tensors.count is {expected}, "
            f"but the {len(parts)} parts have {len(tensors)} tensors"
        )
    return replace(first, tensors=tensors)


def read_part(path: Path) -> GGUFHeader:
    """Parse the header of one file, which may be a part of a split model. Raises as read_header."""
    if not path.is_file():
        raise ModelNotFound(f"no model file at {path}")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelInvalid(f"{path.name}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderParser(path, data).parse()
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error


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
_LENGTH = struct.Struct("<Q")
_MIN_STRING_BYTES = 8  # its length
_MIN_ARRAY_BYTES = 12  # element type and count
_MIN_ENTRY_BYTES = _MIN_STRING_BYTES + 4 + 1  # key, type, the smallest value
_MIN_TENSOR_BYTES = _MIN_STRING_BYTES + 4 + 4 + 8  # name, number of dimensions (may be 0), type, offset


class _HeaderParser:
    """A cursor over one file that refuses to move past the end of the file or the bounds of a header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._name = path.name
        self._path = path
        self._data = data
        self._size = len(data)
        self._end = min(self._size, _MAX_HEADER_BYTES)  # of what may be read as header
        self._pos = 0
        self._num_elements = 0  # of all arrays so far
        self._place = "header"  # what is being read: for messages

    def parse(self) -> GGUFHeader:
        if self._take(4) != _MAGIC:
            raise ModelInvalid(f"{self._name}: not a GGUF file (it does not start with {_MAGIC.decode()})")
        version = self._scalar("I")
        if version not in _VERSIONS:
            hint = " (a big-endian file?)" if int(version) & 0xFFFF == 0 else ""
            raise ModelUnsupported(f"{self._name}: GGUF version {version}{hint}; versions 2 and 3 can be read")
        num_tensors = self._count(_MIN_TENSOR_BYTES, "tensors", _MAX_TENSORS)
        num_entries = self._count(_MIN_ENTRY_BYTES, "metadata entries", _MAX_ENTRIES)
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
        tensors = {name: replace(tensor, offset=data_start + tensor.offset) for name, tensor in relative.items()}
        for tensor in tensors.values():
            self._place = f"tensor {tensor.name}"
            if tensor.offset % alignment:
                self._fail(f"data offset {tensor.offset - data_start} is not a multiple of the alignment {alignment}")
            end = tensor.offset + tensor.num_bytes
            if end > self._size:
                self._fail(
                    f"data at bytes {tensor.offset} to {end} ends after the file, which has {self._size} bytes: "
                    "it is truncated or corrupt"
                )
        self._refuse_overlaps(tensors.values())
        return tensors

    def _refuse_overlaps(self, tensors: Iterable[TensorInfo]) -> None:
        for before, after in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
            if before.offset + before.num_bytes > after.offset:
                self._place = f"tensor {after.name}"
                self._fail(f"data at byte {after.offset} overlaps that of tensor {before.name}")

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
            kind = OTHER_TYPE_NAMES.get(number, f"number {number}")
            known = " ".join(member.name for member in QuantType)
            raise ModelUnsupported(
                f"{self._name}: {self._place} has type {kind}, which cannot be dequantised; supported: {known} "
                f"(at byte {self._pos})"
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
            return self._string(self._end)
        if value_type is _ValueType.ARRAY:
            return self._array(depth)
        return self._scalar(_SCALARS[value_type])

    def _array(self, depth: int) -> list[MetadataValue]:
        if depth == _MAX_ARRAY_DEPTH:
            self._fail(f"nests arrays deeper than {_MAX_ARRAY_DEPTH}")
        element = self._value_type()
        if element is _ValueType.STRING:
            return [*self._strings(self._elements(_MIN_STRING_BYTES, "strings"))]
        if element is _ValueType.ARRAY:
            return [self._array(depth + 1) for _ in range(self._elements(_MIN_ARRAY_BYTES, "arrays", _ARRAY_COST))]
        code = _SCALARS[element]
        width = struct.calcsize("<" + code)
        count = self._elements(width, "numbers")
        return list(struct.unpack(f"<{count}{code}", self._take(count * width)))

    def _elements(self, min_bytes_each: int, what: str, cost: int = 1) -> int:
        count = self._count(min_bytes_each, what, (_MAX_ARRAY_ELEMENTS - self._num_elements) // cost)
        self._num_elements += count * cost
        return count

    def _strings(self, count: int) -> list[str]:
        """Consecutive strings. Vocabularies have hundreds of thousands, hence no call for each."""
        data, pos, end, length_at = self._data, self._pos, self._end, _LENGTH.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = pos + 8
                stop = start + length_at(data, pos)[0] if start <= end else start
                if stop > end:
                    break
                strings.append(data[start:stop].decode())
                pos = stop
        except UnicodeDecodeError:
            self._pos = pos
            self._string(end)  # fails, and says why
        self._pos = pos
        if len(strings) < count:
            self._string(end)  # the same
        return strings

    def _string(self, max_bytes: int) -> str:
        length = self._count(1, "bytes in a string", self._end)
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

    def _count(self, min_bytes_each: int, what: str, most: int) -> int:
        """A 64-bit count that is followed by at least that many things: never more than the file can hold."""
        count = int(self._scalar("Q"))
        if count * min_bytes_each > self._size - self._pos:
            self._fail(f"claims {count} {what}, more than the {self._size - self._pos} bytes left in the file")
        if count > most:
            self._fail(f"claims {count} {what}, more than the {most} that a header may have here")
        return count

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self._pos:
            self._fail(f"the file ends after {self._size} bytes: it is truncated")
        if num_bytes > self._end - self._pos:
            self._fail(f"the header is longer than {_MAX_HEADER_BYTES} bytes")
        taken = self._data[self._pos : self._pos + num_bytes]
        self._pos += num_bytes
        return taken

    def _fail(self, problem: str) -> NoReturn:
        raise ModelInvalid(f"{self._name}: {self._place}: {problem} (at byte {self._pos})")
