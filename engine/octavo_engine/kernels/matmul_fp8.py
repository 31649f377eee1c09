"""Products of e4m3 with e4m3 (W8A8), with the scales of the public checkpoints, and the quantisation of activations.

Scales: one for a tensor or for each row and column (compressed-tensors' "tensor", "channel" and "token"), or one for
128 features of a row and for 128 x 128 of the weight (DeepSeek-V3's "block").

GPUs whose tensor cores know e4m3 (from 8.9 on) multiply the codes themselves. On the others the codes, of inputs too,
are decoded to float16, which is exact, and multiplied as such: the same numbers at half the rate.

Shapes: R rows, I features in, O features out, B = 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels import matmul
from octavo_engine.kernels.cache import FP8_MAX, decoded, encoded
from octavo_engine.kernels.launch import Kernel, Target, Variant, ceil_div, pointer, target_of
from octavo_engine.kernels.numeric import decode_e4m3, encode_e4m3

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK: Final = 128
_LEAST: Final = 1e-12  # of a scale, so that a row of zeros has one
_COLUMNS: Final = 64
_WIDTH: Final = 1024  # numbers of a row that are quantised at once


@triton.jit(do_not_specialize=["features16"])
def _quantize_rows(codes, scales, x, features16, IS_STATIC: tl.constexpr, WIDTH: tl.constexpr):
    """One row a program: find its scale, unless there is one for all, and encode it."""
    row = tl.program_id(0).to(tl.int64)
    features = features16 * 16
    columns = tl.arange(0, WIDTH)
    if IS_STATIC:
        scale = tl.load(scales)
    else:
        highest = tl.zeros([WIDTH], tl.float32)
        for start in range(0, features, WIDTH):
            inside = start + columns < features
            numbers = tl.load(x + row * features + start + columns, mask=inside, other=0.0).to(tl.float32)
            highest = tl.maximum(highest, tl.abs(numbers))
        scale = tl.maximum(tl.div_rn(tl.max(highest, 0), 448.0), 1e-12)
        tl.store(scales + row, scale)
    for start in range(0, features, WIDTH):
        inside = start + columns < features
        numbers = tl.load(x + row * features + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes + row * features + start + columns, encode_e4m3(tl.div_rn(numbers, scale)), mask=inside)


@triton.jit(do_not_specialize=["groups"])
def _quantize_groups(codes, scales, x, groups, GROUPS: tl.constexpr):
    """Program (row, some of its groups of 128)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    places = (row * groups + group)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (group < groups)[:, None]
    numbers = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(numbers), 1), 448.0), 1e-12)
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    tl.store(codes + places, encode_e4m3(tl.div_rn(numbers, scale[:, None])), mask=inside)


@triton.jit(do_not_specialize=["x_step", "weight_step", "features16", "rows", "columns16", "num_steps", "share"])
def _multiply_fp8(
    out,
    x,
    weight,
    x_scales,
    weight_scales,
    x_step,  # 1: a scale for each row; 0: one for all
    weight_step,
    features16,
    rows,
    columns16,
    num_steps,
    share,
    IS_BLOCKWISE: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (rows, columns, part of the steps)."""
    columns, features = columns16 * 16, features16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    is_row, is_column = row < rows, column < columns
    in_step = tl.arange(0, STEP)
    x_rows = x + row.to(tl.int64)[:, None] * features
    weight_columns = weight + column.to(tl.int64)[None, :] * features
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, num_steps)):
        feature = step * STEP + in_step
        is_feature = feature < features
        inputs = tl.load(x_rows + feature[None, :], mask=is_row[:, None] & is_feature[None, :], other=0.0)
        weights = tl.load(weight_columns + feature[:, None], mask=is_column[None, :] & is_feature[:, None], other=0.0)
        if not IS_NATIVE:
            inputs, weights = decode_e4m3(inputs), decode_e4m3(weights)
        if IS_BLOCKWISE:
            scale = tl.load(x_scales + row.to(tl.int64) * num_steps + step, mask=is_row, other=0.0)
            block = tl.load(weight_scales + column // 128 * num_steps + step, mask=is_column, other=0.0)
            sums += tl.dot(inputs, weights) * (scale[:, None] * block[None, :])
        else:
            sums = tl.dot(inputs, weights, sums)
    if not IS_BLOCKWISE:
        scale = tl.load(x_scales + row * x_step, mask=is_row, other=0.0)
        channel = tl.load(weight_scales + column * weight_step, mask=is_column, other=0.0)
        sums = sums * (scale[:, None] * channel[None, :])
    places = (part * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _multiply_variant(target: Target, out: torch.dtype, rows: int, *, is_blockwise: bool) -> Variant:
    code = pointer(torch.float8_e4m3fn if target.has_fp8 else torch.uint8)
    return Variant(
        types=(pointer(out), code, code, "*fp32", "*fp32", *("i32",) * 7),
        constants=(
            ("IS_BLOCKWISE", is_blockwise),
            ("IS_NATIVE", target.has_fp8),
            ("STEP", BLOCK),
            ("ROWS", rows),
            ("COLUMNS", _COLUMNS),
        ),
        num_warps=4 if rows == matmul.ROWS[0] or target.has_fp8 else 8,  # decoding takes registers
        num_stages=3,
    )


def _multiply_variants(target: Target) -> Iterator[Variant]:
    for out in (*matmul.DTYPES, torch.float32):
        for rows in matmul.ROWS:
            for is_blockwise in (False, True):
                yield _multiply_variant(target, out, rows, is_blockwise=is_blockwise)


def _rows_variant(dtype: torch.dtype, *, is_static: bool) -> Variant:
    types = ("*u8", "*fp32", pointer(dtype), "i32")
    return Variant(types, (("IS_STATIC", is_static), ("WIDTH", _WIDTH)), num_warps=4)


def _groups_variant(dtype: torch.dtype) -> Variant:
    return Variant(("*u8", "*fp32", pointer(dtype), "i32"), (("GROUPS", 8),), num_warps=4)


def _rows_variants(_target: Target) -> Iterator[Variant]:
    return (_rows_variant(dtype, is_static=is_static) for dtype in matmul.DTYPES for is_static in (False, True))


def _groups_variants(_target: Target) -> Iterator[Variant]:
    return map(_groups_variant, matmul.DTYPES)


QUANTIZE_ROWS: Final = Kernel(_quantize_rows, _rows_variants)
QUANTIZE_GROUPS: Final = Kernel(_quantize_groups, _groups_variants)
MULTIPLY_FP8: Final = Kernel(_multiply_fp8, _multiply_variants)


def quantize_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode activations in e4m3.

    Args:
        x: float16 or bfloat16 [R, I], contiguous.
        scale: float32 [1], calibrated ahead; None: each row has its own, of its highest number.

    Returns:
        Codes, uint8 [R, I], and scales, float32 [1] or [R].
    """
    assert x.is_contiguous(), "rows lie side by side"
    assert x.shape[1] % 16 == 0, "loads of 16 bytes"
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device) if scale is None else scale
    variant = _rows_variant(x.dtype, is_static=scale is not None)
    QUANTIZE_ROWS.launch(variant, (len(x),), codes, scales, x, x.shape[1] // 16)
    return codes, scales


def quantize_rows_twin(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    if scale is not None:
        return encoded(x.float() / scale), scale
    scales = (x.float().abs().amax(1) / FP8_MAX).clamp_min(_LEAST)
    return encoded(x.float() / scales[:, None]), scales


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode activations in e4m3 with a scale for each 128 features.

    Args:
        x: float16 or bfloat16 [R, I], contiguous; I is a multiple of 128.

    Returns:
        Codes, uint8 [R, I], and scales, float32 [R, I / 128].
    """
    assert x.is_contiguous(), "rows lie side by side"
    assert x.shape[1] % BLOCK == 0, "whole groups"
    groups = x.shape[1] // BLOCK
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((len(x), groups), dtype=torch.float32, device=x.device)
    variant = _groups_variant(x.dtype)
    QUANTIZE_GROUPS.launch(variant, (len(x), ceil_div(groups, variant["GROUPS"])), codes, scales, x, groups)
    return codes, scales


def quantize_groups_twin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    in_groups = x.float().view(len(x), -1, BLOCK)
    scales = (in_groups.abs().amax(2) / FP8_MAX).clamp_min(_LEAST)
    return encoded(in_groups / scales[:, :, None]).view(x.shape), scales


def multiply_fp8(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """X times the transpose of the weight.

    Args:
        x: codes of e4m3, uint8 [R, I], contiguous; I is a multiple of 16.
        weight: the same [O, I]; O is a multiple of 16.
        x_scales: float32 [1], [R], or [R, I / B] with blocks.
        weight_scales: float32 [1], [O], or [O / B, I / B] with blocks, rounded up.
        dtype: float16 or bfloat16.

    Returns:
        `dtype` [R, O].
    """
    assert x.is_contiguous(), "rows lie side by side"
    assert weight.is_contiguous(), "rows lie side by side"
    assert x.shape[1] % 16 == 0, "loads of 16 bytes"
    target, is_blockwise = target_of(x.device), weight_scales.ndim == 2
    assert not is_blockwise or x.shape[1] % BLOCK == 0, "whole blocks"
    code = torch.float8_e4m3fn if target.has_fp8 else torch.uint8

    def choose(out: torch.dtype, height: int) -> Variant:
        return _multiply_variant(target, out, height, is_blockwise=is_blockwise)

    steps = (int(len(x_scales) > 1), int(len(weight_scales) > 1))
    args = (x.view(code), weight.view(code), x_scales, weight_scales, *steps, x.shape[1] // 16)
    sizes = {"rows": len(x), "columns": len(weight), "num_steps": ceil_div(x.shape[1], BLOCK)}
    return matmul.multiply(MULTIPLY_FP8, choose, args, **sizes, dtype=dtype, device=x.device)


def multiply_fp8_twin(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The same in torch."""
    inputs, weights = decoded(x), decoded(weight)
    if weight_scales.ndim == 2:
        inputs = inputs * x_scales.repeat_interleave(BLOCK, 1)
        both = weight_scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)
        return (inputs @ (weights * both).T).to(dtype)
    return ((inputs @ weights.T) * x_scales.view(-1, 1) * weight_scales).to(dtype)
