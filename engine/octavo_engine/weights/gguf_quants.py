"""Dequantisation: the packed bytes of a GGUF tensor to float32, in torch.

Called by stored.py, a slice of rows at a time. It knows the block layouts and nothing about files or models.

Layouts: ggml's block_q* structs (ggml-common.h). Within a block of 32 numbers the low nibbles hold the first 16 and
the high nibbles the last 16. The arithmetic is float32 in the order of ggml's own, so that the results are equal.

Shapes: B blocks in the slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from octavo_engine.weights.gguf import QuantType

if TYPE_CHECKING:
    from collections.abc import Callable


def dequantize(packed: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """Unpack whole blocks.

    Args:
        packed: the bytes, uint8 [B * quant_type.block_bytes].
        quant_type: how they are stored.

    Returns:
        float32 [B * quant_type.block_size].
    """
    return _UNPACK[quant_type](packed.view(-1, quant_type.block_bytes)).reshape(-1)


def _f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.bfloat16).float()


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks[:, :2]) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).to(torch.int8) - 8).float()


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float() + _halves(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _halves(blocks[:, :2]) * (quants.to(torch.int8) - 16).float()


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks[:, :2]) * quants.float() + _halves(blocks[:, 2:4])


def _halves(two_bytes: torch.Tensor) -> torch.Tensor:
    """A float16 scale or minimum of each block: uint8 [B, 2] -> float32 [B, 1]."""
    return two_bytes.contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Uint8 [B, 16] -> uint8 [B, 32]: all low nibbles, then all high ones."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Uint8 [B, 4], a little-endian word with one bit for each number -> uint8 [B, 32], the bit at the value of 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1) << 4


_UNPACK: dict[QuantType, Callable[[torch.Tensor], torch.Tensor]] = {
    QuantType.F32: _f32,
    QuantType.F16: _f16,
    QuantType.BF16: _bf16,
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
}
