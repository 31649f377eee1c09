"""Products with GGUF's weights as the file has them: Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.

Layouts: ggml's block_* structs (ggml-common.h); weights/gguf_quants.py unpacks the same on the CPU. All of them are a
whole number of 16-bit words and begin at even addresses, and no wider word is aligned in a block of 18 or 34 bytes: so
rows are read in words of 16 bits, and a word of four-bit codes serves four columns of the input.

Codes of one byte are of features that lie far apart, so a step is several dot products, one for each run of features
that come out of the same bytes, and nothing is moved between them. Weights are computed in float32 in ggml's order and
rounded to the dtype of the inputs once.

Shapes: R rows, I features in, O features out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels import matmul
from octavo_engine.kernels.launch import Kernel, Target, Variant, pointer
from octavo_engine.weights.gguf_quants import dequantize
from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from collections.abc import Iterator

# Features of a step: a block, or of the K-quants the features whose codes share bytes.
STEPS: Final = {
    QuantType.Q4_0: 32,
    QuantType.Q4_1: 32,
    QuantType.Q8_0: 32,
    QuantType.Q4_K: 64,
    QuantType.Q6_K: 128,
}
_COLUMNS: Final = 64


@triton.jit
def _half(words, places):
    """Float16 numbers at some words: float32 of the shape of `places`."""
    return tl.load(words + places).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _bytes(words, places, COUNT: tl.constexpr):
    """COUNT bytes from each of some words on: int32 [COUNT, columns]."""
    read = tl.load(words + places[None, :] + tl.arange(0, COUNT // 2)[:, None]).to(tl.int32)
    pairs = (read[:, None, :] >> (tl.arange(0, 2) * 8)[None, :, None]) & 0xFF
    return tl.reshape(pairs, (COUNT, places.shape[0]))


@triton.jit
def _byte(words, places, index):
    """The byte `index`, a scalar, from each of some words on: int32 of the shape of `places`."""
    read = tl.load(words + places + index // 2).to(tl.int32)
    return (read >> (index % 2 * 8)) & 0xFF


@triton.jit
def _times(sums, x_rows, is_row, feature, weights, COUNT: tl.constexpr):
    """Add the product of COUNT features with their weights, float32 [COUNT, columns]."""
    inputs = tl.load(x_rows + (feature + tl.arange(0, COUNT))[None, :], mask=is_row[:, None], other=0.0)
    return tl.dot(inputs, weights.to(inputs.dtype), sums)


@triton.jit
def _step_q4(sums, x_rows, is_row, words, row_words, step, HAS_MINIMUM: tl.constexpr):
    """A block of 32 four-bit codes: a scale, a minimum or 8 for zero, and 16 bytes."""
    head: tl.constexpr = 2 if HAS_MINIMUM else 1
    block = row_words + step * (8 + head)
    scale = _half(words, block)[None, :]
    codes = _bytes(words, block + head, 16)
    if HAS_MINIMUM:
        minimum = _half(words, block + 1)[None, :]
        low = scale * (codes & 0xF).to(tl.float32) + minimum
        high = scale * (codes >> 4).to(tl.float32) + minimum
    else:
        low = scale * ((codes & 0xF) - 8).to(tl.float32)
        high = scale * ((codes >> 4) - 8).to(tl.float32)
    sums = _times(sums, x_rows, is_row, step * 32, low, 16)
    return _times(sums, x_rows, is_row, step * 32 + 16, high, 16)


@triton.jit
def _step_q8(sums, x_rows, is_row, words, row_words, step):
    """A block of 32 signed bytes behind a scale."""
    block = row_words + step * 17
    codes = _bytes(words, block + 1, 32)
    codes = codes - ((codes & 0x80) << 1)
    return _times(sums, x_rows, is_row, step * 32, _half(words, block)[None, :] * codes.to(tl.float32), 32)


@triton.jit
def _scale_and_minimum(words, scales, group):
    """Six bits each of a group of Q4_K, whose high two bits are elsewhere for groups from 4 on: float32 [columns]."""
    own, minimum = _byte(words, scales, group), _byte(words, scales, group + 4)
    top = _byte(words, scales, tl.maximum(group - 4, 0))
    is_first = group < 4
    scale = tl.where(is_first, own & 63, (minimum & 0xF) | (top >> 6 << 4))
    return scale.to(tl.float32), tl.where(is_first, minimum & 63, (minimum >> 4) | (own >> 6 << 4)).to(tl.float32)


@triton.jit
def _step_q4_k(sums, x_rows, is_row, words, row_words, step):
    """Two groups of 32 of the eight in a block of 256, whose codes are the halves of the same 32 bytes."""
    block = row_words + step // 4 * 72
    pair = step % 4
    codes = _bytes(words, block + 8 + pair * 16, 32)
    factor, offset = _half(words, block), _half(words, block + 1)
    scale, minimum = _scale_and_minimum(words, block + 2, pair * 2)
    low = (factor * scale)[None, :] * (codes & 0xF).to(tl.float32) - (offset * minimum)[None, :]
    sums = _times(sums, x_rows, is_row, step * 64, low, 32)
    scale, minimum = _scale_and_minimum(words, block + 2, pair * 2 + 1)
    high = (factor * scale)[None, :] * (codes >> 4).to(tl.float32) - (offset * minimum)[None, :]
    return _times(sums, x_rows, is_row, step * 64 + 32, high, 32)


@triton.jit
def _run_q6_k(sums, x_rows, is_row, words, block, half, run, feature, codes):
    """32 features of a block of Q6_K, with two scales."""
    read = tl.load(words + block + 96 + half * 4 + run).to(tl.int32)[None, :]  # two signed bytes
    first = (read & 0xFF) - ((read & 0x80) << 1)
    scale = tl.where(tl.arange(0, 32)[:, None] < 16, first, read >> 8).to(tl.float32)
    weights = _half(words, block + 104)[None, :] * scale * (codes - 32).to(tl.float32)
    return _times(sums, x_rows, is_row, feature + run * 32, weights, 32)


@triton.jit
def _step_q6_k(sums, x_rows, is_row, words, row_words, step):
    """Half a block of 256: four runs of 32, their low four bits in 64 bytes, their high two in 32 others."""
    block = row_words + step // 2 * 105
    half = step % 2
    first = _bytes(words, block + half * 32, 32)
    second = _bytes(words, block + half * 32 + 16, 32)
    top = _bytes(words, block + 64 + half * 16, 32)
    feature = step * 128
    sums = _run_q6_k(sums, x_rows, is_row, words, block, half, 0, feature, (first & 0xF) | ((top & 3) << 4))
    sums = _run_q6_k(sums, x_rows, is_row, words, block, half, 1, feature, (second & 0xF) | ((top >> 2 & 3) << 4))
    sums = _run_q6_k(sums, x_rows, is_row, words, block, half, 2, feature, (first >> 4) | ((top >> 4 & 3) << 4))
    return _run_q6_k(sums, x_rows, is_row, words, block, half, 3, feature, (second >> 4) | ((top >> 6) << 4))


@triton.jit(do_not_specialize=["x_stride16", "row_words", "rows", "columns16", "num_steps", "share"])
def _multiply_gguf(
    out,
    x,
    words,
    x_stride16,
    row_words,
    rows,
    columns16,
    num_steps,
    share,
    TYPE: tl.constexpr,  # ggml's number of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (rows, columns, part of the steps). `words` are the packed rows, int16 [O, row_words]."""
    columns = columns16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    is_row, is_column = row < rows, column < columns
    x_rows = x + row.to(tl.int64)[:, None] * x_stride16 * 16
    # Columns behind the last are computed as the last, and not stored.
    column_words = tl.minimum(column, columns - 1).to(tl.int64) * row_words
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, num_steps)):
        if TYPE == 2:
            sums = _step_q4(sums, x_rows, is_row, words, column_words, step, False)
        elif TYPE == 3:
            sums = _step_q4(sums, x_rows, is_row, words, column_words, step, True)
        elif TYPE == 8:
            sums = _step_q8(sums, x_rows, is_row, words, column_words, step)
        elif TYPE == 12:
            sums = _step_q4_k(sums, x_rows, is_row, words, column_words, step)
        else:
            sums = _step_q6_k(sums, x_rows, is_row, words, column_words, step)
    places = (part * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _variant(out: torch.dtype, dtype: torch.dtype, quant_type: QuantType, rows: int) -> Variant:
    types = (pointer(out), pointer(dtype), "*i16", *("i32",) * 6)
    constants = (("TYPE", int(quant_type)), ("ROWS", rows), ("COLUMNS", _COLUMNS))
    return Variant(types, constants, num_warps=4, num_stages=2)


def _variants(_target: Target) -> Iterator[Variant]:
    for dtype in matmul.DTYPES:
        for out in (dtype, torch.float32):
            for quant_type in STEPS:
                for rows in matmul.ROWS:
                    yield _variant(out, dtype, quant_type, rows)


MULTIPLY_GGUF: Final = Kernel(_multiply_gguf, _variants)


def multiply_gguf(x: torch.Tensor, packed: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """X times the transpose of the weight.

    Args:
        x: float16 or bfloat16 [R, I], each row contiguous.
        packed: the file's rows, uint8 [O, I / block_size * block_bytes], contiguous; O is a multiple of 16.
        quant_type: one of STEPS.

    Returns:
        [R, O] of the dtype of x.
    """
    rows, features = x.shape
    assert x.stride(1) == 1, "the numbers of a row lie side by side"
    assert x.stride(0) % 16 == 0, "loads of 16 bytes"
    words = packed.view(torch.int16)

    def choose(out: torch.dtype, height: int) -> Variant:
        return _variant(out, x.dtype, quant_type, height)

    args = (x, words, x.stride(0) // 16, words.shape[1])
    sizes = {"rows": rows, "columns": len(packed), "num_steps": features // STEPS[quant_type]}
    return matmul.multiply(MULTIPLY_GGUF, choose, args, **sizes, dtype=x.dtype, device=x.device)


def multiply_gguf_twin(x: torch.Tensor, packed: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """The same in torch."""
    weight = dequantize(packed.flatten(), quant_type).view(len(packed), -1).to(x.dtype)
    return (x.float() @ weight.float().T).to(x.dtype)
