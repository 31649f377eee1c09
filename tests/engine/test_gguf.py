"""The GGUF header parser: what it reads, and that no file can make it crash, hang or allocate without bounds."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.weights.gguf import QuantType, read_header

if TYPE_CHECKING:
    from pathlib import Path

UINT32, STRING, ARRAY = 4, 8, 9


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, value_type: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + value


def tensor(name: str, dims: tuple[int, ...], quant_type: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; dims innermost first, as in the file."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, quant_type, offset)


def header(entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), *, version: int = 3) -> bytes:
    """A whole header, up to where the data starts."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_reads_what_the_gguf_package_writes(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.ratio", 0.5)
    writer.add_bool("a.flag", val=True)
    writer.add_string("a.name", "Grüße")
    writer.add_array("a.words", ["x", "", "yz"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_int64("a.negative", -5)
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = read_header(path)

    assert read.metadata["general.architecture"] == "llama"
    assert read.require("a.count", int) == 7
    assert read.require("a.ratio", float) == 0.5
    assert read.metadata["a.flag"] is True
    assert read.require("a.name", str) == "Grüße"
    assert read.require("a.words", list) == ["x", "", "yz"]
    assert read.require("a.numbers", list) == [1, -2, 3]
    assert read.require("a.negative", int) == -5
    assert read.get("a.absent", int, 9) == 9
    first, second = read.tensors["first"], read.tensors["second"]
    assert (first.shape, first.quant_type, first.num_bytes) == ((2, 3), QuantType.F32, 24)
    assert (second.shape, second.quant_type, second.num_bytes) == ((4,), QuantType.F16, 8)
    data = path.read_bytes()
    assert np.frombuffer(data, np.float32, 6, first.offset).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.frombuffer(data, np.float16, 4, second.offset).tolist() == [0, 1, 2, 3]
    assert read.num_parameters == 10


def test_a_key_that_is_absent_or_of_another_type_is_named(path: Path) -> None:
    path.write_bytes(header((entry("a.flag", 7, b"\1"), entry("a.name", STRING, string("x")))))
    read = read_header(path)
    with pytest.raises(ModelInvalid, match=r"metadata key a\.absent is missing"):
        read.require("a.absent", int)
    with pytest.raises(ModelInvalid, match=r"metadata key a\.name is str, not int"):
        read.require("a.name", int)
    with pytest.raises(ModelInvalid, match=r"metadata key a\.flag is bool, not int"):
        read.get("a.flag", int, 0)


def test_a_path_without_a_file_is_not_found(path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model file at"):
        read_header(path)


HUGE = struct.pack("<Q", 2**63)

CORRUPT = {
    "an empty file": (b"", "the file is empty"),
    "another format": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "a file of three bytes": (b"GGU", "truncated"),
    "more tensors than fit": (b"GGUF" + struct.pack("<I", 3) + HUGE + bytes(8), "claims 9223372036854775808 tensors"),
    "more entries than fit": (b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE, "claims 9223372036854775808 metadata entries"),
    "a string longer than the file": (header((string("k") + struct.pack("<I", STRING) + HUGE,)), "metadata key k"),
    "an array longer than the file": (
        header((entry("k", ARRAY, struct.pack("<I", UINT32) + HUGE),)),
        "metadata key k: claims 9223372036854775808 numbers",
    ),
    "arrays nested without end": (
        header((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000),)),
        "metadata key k: nests arrays deeper than 4",
    ),
    "an unknown value type": (header((entry("k", 99, b""),)), "metadata key k: has unknown value type 99"),
    "a key that appears twice": (header((entry("k", UINT32, bytes(4)),) * 2), "metadata key k: appears twice"),
    "a name that is no text": (header((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "not UTF-8"),
    "an alignment of zero": (
        header((entry("general.alignment", UINT32, bytes(4)),)),
        "general.alignment: is 0, not a positive multiple of 8",
    ),
    "a tensor that appears twice": (header((), (tensor("t", (4,)),) * 2), "tensor t: appears twice"),
    "a tensor of five dimensions": (header((), (tensor("t", (1,) * 5),)), "tensor t: has 5 dimensions"),
    "an empty tensor": (header((), (tensor("t", (4, 0)),)), "tensor t: has an empty dimension"),
    "half a block": (
        header((), (tensor("t", (40,), 2),)),
        "tensor t: rows of 40 numbers do not divide into Q4_0 blocks",
    ),
    "unaligned data": (header((), (tensor("t", (1,), 0, 4),)) + bytes(64), "tensor t: data offset 4"),
    "data beyond the end": (header((), (tensor("t", (64,)),)) + bytes(255), "tensor t: data at bytes"),
    "dimensions that overflow 64 bits": (header((), (tensor("t", (2**63, 2**63)),)), "tensor t: data at bytes"),
}


@pytest.mark.parametrize(("content", "message"), CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file_is_refused_by_the_place_at_fault(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelInvalid, match=r"^model\.gguf: ") as refusal:
        read_header(path)
    assert message in str(refusal.value)


UNSUPPORTED = {
    "version 1": (header(version=1), "GGUF version 1"),
    "a big-endian file": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file?"),
    "a type that is not dequantised": (header((), (tensor("t", (256,), 12),)), "tensor t has type Q4_K"),
    "a type that nobody knows": (header((), (tensor("t", (256,), 77),)), "tensor t has type number 77"),
}


@pytest.mark.parametrize(("content", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a_file_of_another_kind_is_refused_by_name(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported) as refusal:
        read_header(path)
    assert message in str(refusal.value)


WHOLE = header(
    (
        entry("general.architecture", STRING, string("llama")),
        entry("words", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
        entry("numbers", ARRAY, struct.pack("<IQ3I", UINT32, 3, 1, 2, 3)),
    ),
    (tensor("x", (32, 2), 8), tensor("y", (4,), 0, 96)),
) + bytes(112)


def test_a_file_cut_at_any_byte_is_refused(path: Path) -> None:
    path.write_bytes(WHOLE)
    assert read_header(path).num_parameters == 68
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(ModelInvalid):
            read_header(path)


@given(
    patches=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
    )
)
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_header_is_read_or_refused(path: Path, patches: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(WHOLE)
    for position, replacement in patches:
        damaged[position : position + len(replacement)] = replacement
    path.write_bytes(damaged)
    with contextlib.suppress(ModelInvalid, ModelUnsupported):
        read = read_header(path)
        assert all(info.offset + info.num_bytes <= len(damaged) for info in read.tensors.values())


def test_reading_a_header_imports_no_torch() -> None:
    code = "import sys, octavo_engine.weights.gguf, octavo_engine.sizing, octavo_engine.resources; "
    code += "import octavo_engine.models.checkpoint; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
