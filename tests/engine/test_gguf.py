"""The GGUF header parser: what it reads, and that no file can make it crash, hang or allocate without bounds."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.weights.gguf import read_header
from octavo_engine.weights.quant_type import QuantType

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
    "tensors that overlap": (
        header((), (tensor("t", (16,)), tensor("u", (8,), 0, 32))) + bytes(64),
        "tensor u: data at byte 128 overlaps that of tensor t",
    ),
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
    "a type that is not dequantised": (header((), (tensor("t", (256,), 16),)), "tensor t has type IQ2_XXS"),
    "a type that nobody knows": (header((), (tensor("t", (256,), 77),)), "tensor t has type number 77"),
}


@pytest.mark.parametrize(("content", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a_file_of_another_kind_is_refused_by_name(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported) as refusal:
        read_header(path)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 2**18, 0), "claims 262144 tensors, more than the 131072"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**17), "claims 131072 metadata entries, more than the 65536"),
        (
            header((entry("k", ARRAY, struct.pack("<IQ", UINT32, 2**33)),)),
            "metadata key k: claims 8589934592 numbers, more than the 4194304",
        ),
        (
            header((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 2**16 + 1)),)),
            "metadata key k: claims 65537 arrays, more than the 65536",
        ),
        (
            header((entry("k", ARRAY, struct.pack("<IQIQ", ARRAY, 2**16 - 1, 0, 65)),)),
            "metadata key k: claims 65 numbers, more than the 64",  # all arrays count together
        ),
        (header((string("k") + struct.pack("<IQ", STRING, 2**34),)), "claims 17179869184 bytes in a string"),
        (header((), (tensor("t", (2**32, 2**4)),)), "tensor t: data at bytes"),
    ],
    ids=["tensors", "entries", "an array", "nested arrays", "their elements", "a string", "dimensions"],
)
def test_claims_that_a_huge_file_could_hold_are_refused_before_memory_is_taken(
    path: Path, content: bytes, message: str
) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(100 << 30)  # sparse: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ModelInvalid) as refusal:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert message in str(refusal.value)
    assert "(at byte " in str(refusal.value)


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


PATCHES = st.lists(
    st.tuples(
        st.integers(0, len(WHOLE) - 1),
        # Lengths, counts and types are what hurts, so whole numbers of every width come as often as any bytes.
        st.binary(min_size=1, max_size=8)
        | st.builds(struct.pack, st.just("<I"), st.integers(0, 2**32 - 1))
        | st.builds(struct.pack, st.just("<Q"), st.integers(0, 2**64 - 1)),
    ),
    min_size=1,
    max_size=4,
)


DAMAGE = given(patches=PATCHES, length=st.none() | st.integers(0, len(WHOLE)))


def check_damaged(path: Path, patches: list[tuple[int, bytes]], length: int | None) -> None:
    """Read or refused, and with little memory."""
    content = bytearray(WHOLE)
    for position, replacement in patches:
        content[position : position + len(replacement)] = replacement
    del content[len(content) if length is None else length :]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(ModelInvalid, ModelUnsupported):
            read = read_header(path)
            assert all(info.offset + info.num_bytes <= len(content) for info in read.tensors.values())
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@DAMAGE
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_header_is_read_or_refused(path: Path, patches: list[tuple[int, bytes]], length: int | None) -> None:
    check_damaged(path, patches, length)


@pytest.mark.long
@pytest.mark.timeout(1800)
@DAMAGE
@settings(max_examples=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_ten_thousand_damaged_headers_are_read_or_refused(
    path: Path, patches: list[tuple[int, bytes]], length: int | None
) -> None:
    check_damaged(path, patches, length)


def write_split(folder: Path) -> list[Path]:
    """Three tensors in three parts, as the gguf package writes them."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("a.count", 7)
    for index in range(3):
        writer.add_tensor(f"t{index}", np.full((2, 4), index, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("model-*.gguf"))


def test_a_split_model_is_whole_from_any_of_its_parts(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        read = read_header(part)
        assert read.path == parts[0]
        assert read.require("a.count", int) == 7
        assert [info.path for info in read.tensors.values()] == parts
        for index, info in enumerate(read.tensors.values()):
            assert info.name == f"t{index}"
            assert np.frombuffer(info.path.read_bytes(), np.float32, 8, info.offset).tolist() == [index] * 8


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    parts[1].unlink()
    with pytest.raises(ModelNotFound, match=r"part model-00002-of-00003\.gguf of a model of 3 parts is not in"):
        read_header(parts[2])
    parts[2].unlink()
    with pytest.raises(ModelNotFound, match=r"part model-00002-of-00003\.gguf and 1 more of"):
        read_header(parts[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    alone = parts[1].rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelInvalid, match=r"alone\.gguf: this is part 2 of 3 of a split model"):
        read_header(alone)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ModelInvalid, match=r"model-00002-of-00003\.gguf: metadata key split\.no is 0, .* says 1"):
        read_header(parts[0])


def part(number: int, count: int, tensors: tuple[bytes, ...], *, in_all: int) -> bytes:
    numbers = {"split.no": number, "split.count": count, "split.tensors.count": in_all}
    entries = tuple(entry(key, UINT32, struct.pack("<I", value)) for key, value in numbers.items())
    return header(entries, tensors) + bytes(32)


def test_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(part(0, 2, (tensor("t", (4,)),), in_all=3))
    second.write_bytes(part(1, 2, (tensor("u", (4,)),), in_all=3))
    with pytest.raises(ModelInvalid, match=r"split\.tensors\.count is 3, but the 2 parts have 2 tensors"):
        read_header(first)
    second.write_bytes(part(1, 2, (tensor("t", (4,)),), in_all=3))
    with pytest.raises(ModelInvalid, match=r"m-00002.*: tensor t is in m-00001-of-00002\.gguf too"):
        read_header(first)
    second.write_bytes(header((), (tensor("u", (4,)),)) + bytes(32))
    with pytest.raises(ModelInvalid, match=r"m-00002.*: metadata key split\.no is missing"):
        read_header(first)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "model.gguf"
    loop.mkdir()
    with pytest.raises(ModelNotFound, match="no model file at"):
        read_header(loop)


def test_reading_a_header_imports_no_torch() -> None:
    code = "import sys, octavo_engine.weights.gguf, octavo_engine.sizing, octavo_engine.resources; "
    code += "import octavo_engine.models.checkpoint; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
