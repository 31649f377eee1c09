"""Products with GPTQ's and AWQ's weights: 4 or 8 bits in memory, float16 or bfloat16 in the tensor cores.

The codes stay packed and are unpacked in registers. Both formats are brought into one layout by `from_gptq` and
`from_awq`, once, when a model is loaded: GPTQ's own (Frantar et al. 2022; AutoGPTQ's files), words of codes that are
adjacent along the inner dimension, which is where the kernel unpacks them. A weight is (code - zero) * scale.

Shapes: R rows, I features in, O features out, G groups of rows of the weight with a scale for each column, C codes in
a word of 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels import matmul
from octavo_engine.kernels.launch import Kernel, Target, Variant, pointer

if TYPE_CHECKING:
    from collections.abc import Iterator

BITS: Final = (4, 8)
_STEPS: Final = (32, 64)  # numbers along I at once: a group is a multiple of them
_COLUMNS: Final = 128
_AWQ_COLUMNS: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight the codes in AWQ's words are of, lowest first


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the kernel's layout."""

    codes: torch.Tensor  # int32 [I / C, O]: word i has the codes of rows C i to C i + C - 1, the lowest bits first
    scales: torch.Tensor  # float16 or bfloat16 [G, O]
    zeros: torch.Tensor  # uint8 [G, O]: the code that stands for 0
    bits: int  # of a code: 4 or 8
    order: torch.Tensor | None = None  # int64 [I]: the feature that each row is of; None: in order

    @property
    def group_size(self) -> int:
        """Rows that share scales."""
        return self.codes.shape[0] * 32 // self.bits // self.scales.shape[0]


@triton.jit(do_not_specialize=["x_stride16", "steps_per_group", "rows", "columns16", "num_steps", "share"])
def _multiply_packed(
    out,
    x,
    codes,
    scales,
    zeros,
    x_stride16,
    steps_per_group,
    rows,
    columns16,
    num_steps,
    share,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (rows, columns, part of the steps)."""
    columns = columns16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    is_row, is_column = row < rows, column < columns
    in_step = tl.arange(0, STEP)
    words_a_step: tl.constexpr = STEP * BITS // 32
    word = tl.arange(0, words_a_step)
    shifts = tl.arange(0, 32 // BITS) * BITS
    x_rows = x + row.to(tl.int64)[:, None] * x_stride16 * 16
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, num_steps)):
        inputs = tl.load(x_rows + (step * STEP + in_step)[None, :], mask=is_row[:, None], other=0.0)
        code_rows = (step * words_a_step + word).to(tl.int64)[:, None] * columns
        words = tl.load(codes + code_rows + column[None, :], mask=is_column[None, :], other=0)
        unpacked = (words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
        unpacked = tl.reshape(unpacked, (STEP, COLUMNS))
        group = (step // steps_per_group).to(tl.int64) * columns + column
        scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group, mask=is_column, other=0).to(tl.int32)
        weights = (unpacked - zero[None, :]).to(tl.float32) * scale[None, :]
        sums = tl.dot(inputs, weights.to(inputs.dtype), sums)
    places = (part * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _variant(out: torch.dtype, dtype: torch.dtype, scales: torch.dtype, bits: int, step: int, rows: int) -> Variant:
    types = (pointer(out), pointer(dtype), "*i32", pointer(scales), "*u8", *("i32",) * 6)
    constants = (("BITS", bits), ("STEP", step), ("ROWS", rows), ("COLUMNS", _COLUMNS))
    return Variant(types, constants, num_warps=4 if rows == 16 else 8, num_stages=3)


def _variants(_target: Target) -> Iterator[Variant]:
    for dtype in matmul.DTYPES:
        for out in (dtype, torch.float32):
            for scales in matmul.DTYPES:
                for bits in BITS:
                    for step in _STEPS:
                        for rows in matmul.ROWS:
                            yield _variant(out, dtype, scales, bits, step, rows)


MULTIPLY_PACKED: Final = Kernel(_multiply_packed, _variants)


def multiply_packed(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """X times the weight.

    Args:
        x: float16 or bfloat16 [R, I], each row contiguous.
        weight: groups of a multiple of 32 rows; O is a multiple of 16.

    Returns:
        [R, O] of the dtype of x.
    """
    x = x if weight.order is None else x.index_select(1, weight.order)
    rows, features = x.shape
    step = 64 if weight.group_size % 64 == 0 else 32
    assert weight.group_size % step == 0, "a step has one scale for each column"
    assert x.stride(1) == 1, "the numbers of a row lie side by side"
    assert x.stride(0) % 16 == 0, "loads of 16 bytes"

    def choose(out: torch.dtype, height: int) -> Variant:
        return _variant(out, x.dtype, weight.scales.dtype, weight.bits, step, height)

    args = (x, weight.codes, weight.scales, weight.zeros, x.stride(0) // 16, weight.group_size // step)
    sizes = {"rows": rows, "columns": weight.codes.shape[1], "num_steps": features // step}
    return matmul.multiply(MULTIPLY_PACKED, choose, args, **sizes, dtype=x.dtype, device=x.device)


def multiply_packed_twin(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The same in torch."""
    weights = dequantize(weight).to(x.dtype).float()
    inputs = x if weight.order is None else x.index_select(1, weight.order)
    return (inputs.float() @ weights).to(x.dtype)


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """The numbers in the order of the rows as they are packed: float32 [I, O]."""
    codes = unpack(weight.codes, weight.bits, dim=0)
    zeros = weight.zeros.int().repeat_interleave(weight.group_size, 0)
    return (codes - zeros).float() * weight.scales.float().repeat_interleave(weight.group_size, 0)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    bits: int,
    zero_offset: int = 1,
) -> PackedWeight:
    """Take a layer of a GPTQ checkpoint.

    Args:
        qweight: int32 [I / C, O].
        qzeros: int32 [G, O / C], packed along O.
        scales: float16 or bfloat16 [G, O].
        g_idx: int32 [I], the group of each row; rows of a group may lie anywhere ("act order"). None: in order.
        bits: of a code.
        zero_offset: what the stored zeros are too small by: 1, or 0 in files of format gptq_v2.

    Returns:
        A weight whose groups lie together.
    """
    zeros = (unpack(qzeros, bits, dim=1) + zero_offset).to(torch.uint8)
    if g_idx is None or bool((g_idx[1:] >= g_idx[:-1]).all()):
        return PackedWeight(qweight.contiguous(), scales.contiguous(), zeros, bits)
    order = torch.argsort(g_idx, stable=True)
    codes = pack(unpack(qweight, bits, dim=0)[order], bits)
    return PackedWeight(codes, scales.contiguous(), zeros, bits, order)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """Take a layer of an AWQ checkpoint (Lin et al. 2023; the "gemm" version), 4 bits.

    Args:
        qweight: int32 [I, O / 8], packed along O.
        qzeros: int32 [G, O / 8], packed likewise.
        scales: float16 or bfloat16 [G, O].
    """
    places = torch.tensor(_AWQ_COLUMNS).argsort()

    def in_order(packed: torch.Tensor) -> torch.Tensor:
        return unpack(packed, 4, dim=1).view(len(packed), -1, 8)[:, :, places].flatten(1)

    return PackedWeight(pack(in_order(qweight), 4), scales.contiguous(), in_order(qzeros).to(torch.uint8), 4)


def unpack(words: torch.Tensor, bits: int, *, dim: int) -> torch.Tensor:
    """Codes of words of 32 bits, the lowest first, as int32; `dim`, 0 or 1, becomes longer by the codes in a word."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    shape = (1, -1, 1) if dim == 0 else (1, 1, -1)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 [I, O] -> int32 [I / C, O], what `unpack` with dim=0 undoes."""
    shifts = torch.arange(0, 32, bits, device=codes.device).view(1, -1, 1)
    words = (codes.long().view(-1, 32 // bits, codes.shape[1]) << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
