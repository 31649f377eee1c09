"""The gate of the MLP (SwiGLU and GeGLU, Shazeer 2020): activation(gate) * up, in one pass over both.

Shapes: T tokens, M intermediate size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
import triton
import triton.language as tl

from octavo_engine.kernels.launch import Kernel, Target, Variant, ceil_div, pointer
from octavo_engine.kernels.numeric import gelu_tanh, silu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_engine.models.spec import Activation

DTYPES: Final = (torch.float16, torch.bfloat16)
_BLOCK: Final = 1024


@triton.jit(do_not_specialize=["size8"])
def _gate_and_mul(out, gate_up, size8, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, part of its row); the size counts 8 numbers."""
    token = tl.program_id(0).to(tl.int64)
    size = size8 * 8
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + columns, mask=inside).to(tl.float32)
    activated = silu(gate) if IS_SILU else gelu_tanh(gate)
    tl.store(out + token * size + columns, (activated * up).to(out.dtype.element_ty), mask=inside)


def _variant(dtype: torch.dtype, activation: Activation) -> Variant:
    constants = (("IS_SILU", activation == "silu"), ("BLOCK", _BLOCK))
    return Variant((pointer(dtype), pointer(dtype), "i32"), constants, num_warps=4)


def _variants(_target: Target) -> Iterator[Variant]:
    for dtype in DTYPES:
        yield _variant(dtype, "silu")
        yield _variant(dtype, "gelu_tanh")


GATE_AND_MUL: Final = Kernel(_gate_and_mul, _variants)


def gate_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up: [T, 2 M] -> [T, M].

    Args:
        gate_up: gate and up projection side by side, float16 or bfloat16, contiguous; M is a multiple of 8.
        activation: which.
    """
    tokens, both = gate_up.shape
    assert gate_up.is_contiguous(), "rows lie side by side"
    assert both % 16 == 0, "loads of 16 bytes"
    out = torch.empty((tokens, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    variant = _variant(gate_up.dtype, activation)
    GATE_AND_MUL.launch(variant, (tokens, ceil_div(both // 2, _BLOCK)), out, gate_up, both // 16)
    return out


def gate_and_mul_twin(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The same in torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (activated * up).to(gate_up.dtype)
