"""Dequantisation against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.weights.gguf_quants import dequantize
from octavo_engine.weights.quant_type import QuantType

BLOCKS = 8
# Random bytes make random scales; these make the extreme ones: zeros, the largest, subnormals, infinities and NaN.
EXTREMES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0\x7c", b"\0\xfc", b"\1\0", b"\xff\x7b", b"\xff\x03", b"\0\x80"]


def theirs(packed: np.ndarray, quant_type: QuantType) -> np.ndarray:
    """What the gguf package makes of whole blocks."""
    with np.errstate(all="ignore"):  # scales may be NaN or overflow
        return gguf.quants.dequantize(
            packed.view(np.float32) if quant_type is QuantType.F32 else packed,
            gguf.GGMLQuantizationType(int(quant_type)),
        ).astype(np.float32)


def assert_same_bits(ours: torch.Tensor, expected: np.ndarray) -> None:
    """The same float32 bits everywhere; of a NaN only that it is one."""
    assert ours.dtype == torch.float32
    numbers, expected = ours.numpy(), expected.reshape(-1)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(numbers), nan)
    np.testing.assert_array_equal(numbers.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("quant_type", QuantType, ids=lambda quant_type: quant_type.name)
def test_every_type_has_ggmls_blocks(quant_type: QuantType) -> None:
    theirs_type = gguf.GGMLQuantizationType(int(quant_type))
    assert (quant_type.block_size, quant_type.block_bytes) == gguf.GGML_QUANT_SIZES[theirs_type]
    assert quant_type.name == theirs_type.name


@pytest.mark.parametrize("quant_type", QuantType, ids=lambda quant_type: quant_type.name)
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from(EXTREMES), st.integers(1, 40)), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_every_type_gives_bit_for_bit_what_the_gguf_package_gives(
    quant_type: QuantType, seed: int, patches: list[tuple[int, bytes, int]]
) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, BLOCKS * quant_type.block_bytes, dtype=np.uint8)
    for position, pattern, times in patches:
        start = position % len(packed)
        room = packed[start:]
        room[: len(pattern) * times] = np.frombuffer(pattern * times, np.uint8)[: len(room)]
    expected = theirs(packed.reshape(BLOCKS, -1), quant_type)
    assert_same_bits(dequantize(torch.from_numpy(packed), quant_type), expected)


@pytest.mark.parametrize("quant_type", QuantType, ids=lambda quant_type: quant_type.name)
def test_thousands_of_random_blocks_are_the_same_too(quant_type: QuantType) -> None:
    packed = np.random.default_rng(0).integers(0, 256, size=(2000, quant_type.block_bytes), dtype=np.uint8)
    assert_same_bits(dequantize(torch.from_numpy(packed.reshape(-1)), quant_type), theirs(packed, quant_type))
