"""Rotary position embeddings in place, from the tables of layers/rotary.py: they hold every scaling there is.

Shapes: T tokens, N heads (queries and keys together, where they lie side by side), D head size, P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels.launch import Kernel, Target, Variant, ceil_div, pointer, power_of_two

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES: Final = (torch.float16, torch.bfloat16)
HEAD_DIMS: Final = (64, 80, 96, 128, 256)
_HEADS: Final = 8  # that one program turns


@triton.jit(do_not_specialize=["heads", "x_stride16"])
def _rotate(
    x,
    cos,
    sin,
    positions,
    heads,
    x_stride16,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (token, some of its heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF_PADDED)
    in_table = tl.load(positions + token) * HALF + pair
    cosines = tl.load(cos + in_table, mask=pair < HALF, other=0.0)[None, :]
    sines = tl.load(sin + in_table, mask=pair < HALF, other=0.0)[None, :]
    places = x + token * x_stride16 * 16 + head[:, None] * (2 * HALF) + pair[None, :]
    inside = (head < heads)[:, None] & (pair < HALF)[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, (first * cosines - second * sines).to(x.dtype.element_ty), mask=inside)
    tl.store(places + HALF, (second * cosines + first * sines).to(x.dtype.element_ty), mask=inside)


def _variant(dtype: torch.dtype, head_dim: int) -> Variant:
    half = head_dim // 2
    types = (pointer(dtype), "*fp32", "*fp32", "*i64", "i32", "i32")
    constants = (("HALF", half), ("HALF_PADDED", power_of_two(half)), ("HEADS", _HEADS))
    return Variant(types, constants, num_warps=4)


def _variants(_target: Target) -> Iterator[Variant]:
    return (_variant(dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS)


ROTATE: Final = Kernel(_rotate, _variants)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Turn each pair (x[d], x[d + D / 2]) by the angle of its token's position, in place and in float32.

    Args:
        x: float16 or bfloat16 [T, N, D], each row contiguous; rows may be parts of longer ones.
        cos: float32 [P, D / 2], contiguous.
        sin: the same.
        positions: int64 [T] < P.
    """
    tokens, heads, head_dim = x.shape
    assert x[0].is_contiguous(), "the numbers of a row lie side by side"
    assert x.stride(0) % 16 == 0, "loads of 16 bytes"
    grid = (tokens, ceil_div(heads, _HEADS))
    ROTATE.launch(_variant(x.dtype, head_dim), grid, x, cos, sin, positions, heads, x.stride(0) // 16)


def rotate_twin(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """The same in torch."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
