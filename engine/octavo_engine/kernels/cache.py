"""Storing the keys and values of a step into the paged cache. Launched by attention/triton.py.

Shapes: T tokens, K KV heads, D head size, B blocks, S slots in a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels.launch import Kernel, Target, Variant, ceil_div, pointer
from octavo_engine.kernels.numeric import encode_e4m3

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES: Final = (torch.float16, torch.bfloat16)
FP8_MAX: Final = 448.0
_BLOCK: Final = 1024  # numbers that a program copies: 8 a thread, so loads of 16 bytes


@triton.jit(do_not_specialize=["k_stride", "v_stride", "size16"])
def _store_kv(
    key_cache,
    value_cache,
    k,
    v,
    slots,
    key_factor,
    value_factor,
    k_stride,
    v_stride,
    size16,
    IS_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, part of its row). Strides and size count 16 numbers: the compiler sees that they divide."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        size = size16 * 16
        places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        keys = tl.load(k + token * k_stride * 16 + places, mask=inside)
        values = tl.load(v + token * v_stride * 16 + places, mask=inside)
        target = slot * size + places
        if IS_FP8:
            tl.store(key_cache + target, encode_e4m3(keys.to(tl.float32) * key_factor), mask=inside)
            tl.store(value_cache + target, encode_e4m3(values.to(tl.float32) * value_factor), mask=inside)
        else:
            tl.store(key_cache + target, keys, mask=inside)
            tl.store(value_cache + target, values, mask=inside)


def _variant(dtype: torch.dtype, *, is_fp8: bool) -> Variant:
    new = pointer(dtype)
    cached = pointer(torch.uint8) if is_fp8 else new
    return Variant(
        types=(cached, cached, new, new, "*i64", "fp32", "fp32", "i32", "i32", "i32"),
        constants=(("IS_FP8", is_fp8), ("BLOCK", _BLOCK)),
        num_warps=4,
    )


def _variants(_target: Target) -> Iterator[Variant]:
    return (_variant(dtype, is_fp8=is_fp8) for dtype in DTYPES for is_fp8 in (False, True))


STORE_KV: Final = Kernel(_store_kv, _variants)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write each token's keys and values to its slot.

    Args:
        k: float16 or bfloat16 [T, K, D], each row contiguous; rows may be parts of longer ones.
        v: the same.
        key_cache: [B, S, K, D] of the dtype of k, or uint8 for codes of e4m3; contiguous.
        value_cache: the same.
        slots: int64 [T]: block * S + offset in it; negative ones are not stored.
        key_scale: what a code of e4m3 is multiplied by to get the number.
        value_scale: the same.
    """
    if len(slots) == 0:
        return
    size = k.shape[1] * k.shape[2]
    assert k[0].is_contiguous(), "the numbers of a token lie side by side"
    assert v[0].is_contiguous(), "the numbers of a token lie side by side"
    assert size % 16 == k.stride(0) % 16 == v.stride(0) % 16 == 0, "loads of 16 bytes"
    variant = _variant(k.dtype, is_fp8=key_cache.dtype == torch.uint8)
    grid = (len(slots), ceil_div(size, _BLOCK))
    factors = (1.0 / key_scale, 1.0 / value_scale)
    strides = (k.stride(0) // 16, v.stride(0) // 16)
    STORE_KV.launch(variant, grid, key_cache, value_cache, k, v, slots, *factors, *strides, size // 16)


def store_kv_twin(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """The same in torch."""
    kept = slots >= 0
    for new, cache, scale in ((k, key_cache, key_scale), (v, value_cache, value_scale)):
        flat = cache.view(-1, *cache.shape[2:])
        flat[slots[kept]] = (encoded(new[kept].float() / scale) if cache.dtype == torch.uint8 else new[kept]).to(
            cache.dtype
        )


def encoded(numbers: torch.Tensor) -> torch.Tensor:
    """float32 -> the codes of e4m3, uint8, saturating; in torch."""
    return numbers.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """The codes of e4m3, uint8 -> float32; in torch."""
    return codes.view(torch.float8_e4m3fn).float()
