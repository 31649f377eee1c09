"""Root-mean-square normalisation (Zhang and Sennrich 2019), after adding to the residual stream or alone.

The GPU's way to what layers/norm.py computes: float32 inside, the residual float32 as in models/decoder.py.

Shapes: R rows, N heads, H the size of what is normalised, a multiple of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels.launch import Kernel, Target, Variant, pointer, power_of_two

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES: Final = (torch.float16, torch.bfloat16)
_WIDTHS: Final = tuple(1 << exponent for exponent in range(6, 15))  # a row is held in registers: up to 16384 numbers


@triton.jit(do_not_specialize=["size16", "x_stride16"])
def _add_rms_norm(
    out,
    residual,
    x,
    weight,
    eps,
    size16,
    x_stride16,
    WIDTH: tl.constexpr,
):
    """One row a program: residual += x, then the norm of it. Sizes count 16 numbers, for loads of 16 bytes."""
    size = size16 * 16
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < size
    numbers = tl.load(residual + row * size + columns, mask=inside, other=0.0)
    numbers += tl.load(x + row * x_stride16 * 16 + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + row * size + columns, numbers, mask=inside)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / size + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * size + columns, (numbers * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size16", "heads", "x_stride16"])
def _rms_norm(
    out,
    x,
    weight,
    eps,
    size16,
    heads,
    x_stride16,
    WIDTH: tl.constexpr,
):
    """Program (row, head): the norm of each head of a row by itself."""
    size = size16 * 16
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    inside = columns < size
    numbers = tl.load(x + row * x_stride16 * 16 + head * size + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / size + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    target = out + (row * heads + head) * size + columns
    tl.store(target, (numbers * scale * weights).to(out.dtype.element_ty), mask=inside)


def _num_warps(width: int) -> int:
    return min(16, max(1, width // 512))  # 16 numbers a thread, until that would be more than 16 warps


def _add_variant(dtype: torch.dtype, width: int) -> Variant:
    types = (pointer(dtype), "*fp32", pointer(dtype), "*fp32", "fp32", "i32", "i32")
    return Variant(types, (("WIDTH", width),), _num_warps(width))


def _alone_variant(x: torch.dtype, out: torch.dtype, width: int) -> Variant:
    types = (pointer(out), pointer(x), "*fp32", "fp32", "i32", "i32", "i32")
    return Variant(types, (("WIDTH", width),), _num_warps(width))


def _add_variants(_target: Target) -> Iterator[Variant]:
    return (_add_variant(dtype, width) for dtype in DTYPES for width in _WIDTHS)


def _alone_variants(_target: Target) -> Iterator[Variant]:
    for dtype in DTYPES:
        for width in _WIDTHS:
            yield _alone_variant(dtype, dtype, width)
            yield _alone_variant(torch.float32, dtype, width)


ADD_RMS_NORM: Final = Kernel(_add_rms_norm, _add_variants)
RMS_NORM: Final = Kernel(_rms_norm, _alone_variants)


def add_rms_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x to the residual in place, and normalise the sum.

    Args:
        residual: float32 [R, H], contiguous.
        x: float16 or bfloat16 [R, H], each row contiguous.
        weight: float32 [H].
        eps: added to the mean square.

    Returns:
        [R, H] of the dtype of x.
    """
    out = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    assert x.stride(1) == 1, "the numbers of a row lie side by side"
    assert x.shape[1] % 16 == x.stride(0) % 16 == 0, "loads of 16 bytes"
    variant = _add_variant(x.dtype, power_of_two(x.shape[1]))
    ADD_RMS_NORM.launch(variant, (len(x),), out, residual, x, weight, eps, x.shape[1] // 16, x.stride(0) // 16)
    return out


def add_rms_norm_twin(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in torch."""
    residual += x
    return rms_norm_twin(residual[:, None], weight, eps, x.dtype)[:, 0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Normalise each head of each row.

    Args:
        x: [R, N, H], of `dtype` or float32; a row contiguous, rows may be parts of longer ones; N = 1: whole rows.
        weight: float32 [H].
        eps: added to the mean square.
        dtype: float16 or bfloat16.

    Returns:
        `dtype` [R, N, H].
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, heads, size = x.shape
    assert x[0].is_contiguous(), "the numbers of a row lie side by side"
    assert size % 16 == x.stride(0) % 16 == 0, "loads of 16 bytes"
    variant = _alone_variant(x.dtype, dtype, power_of_two(size))
    RMS_NORM.launch(variant, (rows, heads), out, x, weight, eps, size // 16, heads, x.stride(0) // 16)
    return out


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """The same in torch."""
    numbers = x.float()
    scale = torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps)
    return (numbers * scale * weight).to(dtype)
