"""Dequantisation: the packed bytes of a GGUF tensor to float32, in torch.

Called by stored.py, a slice of rows at a time. It knows the block layouts and nothing about files or models.

Layouts: ggml's block_* structs (ggml-common.h). Bit fields of one byte belong to numbers that lie far apart, never side
by side: within a block of 32 the low nibbles hold the first 16 numbers and the high nibbles the last 16, and `_planes`
is that rule for any width. The K-quants and IQ4_XS are blocks of 256 numbers in groups of 16 or 32, each group with a
scale of few bits. The arithmetic is float32 in the order of ggml's own, so that the results are equal bit for bit.

Shapes: B blocks in the slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from octavo_engine.weights.quant_type import QuantType

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
    return _halves(blocks[:, :2]) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float() + _halves(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _halves(blocks[:, :2]) * _signed(quants, 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks[:, :2]) * quants.float() + _halves(blocks[:, 2:4])


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, quants = blocks[:, :16, None], _planes(blocks[:, 16:80], bits=2, run=32).view(-1, 16, 16)
    scale = _halves(blocks[:, 80:82])[:, :, None] * (scales & 0x0F).float()
    minimum = _halves(blocks[:, 82:84])[:, :, None] * (scales >> 4).float()
    return scale * quants.float() - minimum


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    third_bits = _planes(blocks[:, :32], bits=1, run=32)
    quants = _planes(blocks[:, 32:96], bits=2, run=32) | third_bits << 2
    scales = _planes(blocks[:, 96:104], bits=4, run=8) | _planes(blocks[:, 104:108], bits=2, run=4) << 4
    scale = _halves(blocks[:, 108:110]) * _signed(scales, 32)
    return scale[:, :, None] * _signed(quants, 4).view(-1, 16, 16)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks[:, :16])
    return scale * _planes(blocks[:, 16:], bits=4, run=32).view(-1, 8, 32).float() - minimum


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks[:, :16])
    fifth_bits = _planes(blocks[:, 16:48], bits=1, run=32)
    quants = _planes(blocks[:, 48:], bits=4, run=32) | fifth_bits << 4
    return scale * quants.view(-1, 8, 32).float() - minimum


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    quants = _planes(blocks[:, :128], bits=4, run=64) | _planes(blocks[:, 128:192], bits=2, run=32) << 4
    scale = _halves(blocks[:, 208:210]) * blocks[:, 192:208].view(torch.int8).float()
    return scale[:, :, None] * _signed(quants, 32).view(-1, 16, 16)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks[:, :2]) * _IQ4_VALUES[_nibbles(blocks[:, 2:]).int()]


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    # The scales lie in order here, two or four to a byte, and not in planes.
    low = torch.stack((blocks[:, 4:8] & 0x0F, blocks[:, 4:8] >> 4), dim=2).flatten(1)
    high = (blocks[:, 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8)).flatten(1) & 3
    scale = _halves(blocks[:, :2]) * _signed(low | high << 4, 32)
    return scale[:, :, None] * _IQ4_VALUES[_planes(blocks[:, 8:], bits=4, run=16).int()].view(-1, 8, 32)


def _halves(two_bytes: torch.Tensor) -> torch.Tensor:
    """A float16 scale or minimum of each block: uint8 [B, 2] -> float32 [B, 1]."""
    return two_bytes.contiguous().view(torch.float16).float()


def _signed(quants: torch.Tensor, zero: int) -> torch.Tensor:
    """Uint8 -> float32, where `zero` stands for 0."""
    return (quants.to(torch.int8) - zero).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Uint8 [B, 16] -> uint8 [B, 32]: all low nibbles, then all high ones."""
    return _planes(packed, bits=4, run=16)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Uint8 [B, 4], a little-endian word with one bit for each number -> uint8 [B, 32], the bit at the value of 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1) << 4


def _planes(packed: torch.Tensor, *, bits: int, run: int) -> torch.Tensor:
    """Unpack fields of `bits` bits: of every `run` bytes first all the lowest fields, then all the next, and so on.

    Uint8 [B, n] -> uint8 [B, n * 8 / bits].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    fields = packed.view(len(packed), packed.shape[1] // run, 1, run) >> shifts
    return (fields & (1 << bits) - 1).flatten(1)


def _scales_and_minima(head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the eight groups of a Q4_K or Q5_K block.

    Six bits each in twelve bytes: four bytes of scales, four of minima (of the first four groups, six bits), and four
    with the low nibbles of the last four groups' scales and minima, whose high bits are on top of the first eight.

    Uint8 [B, 16] -> two of float32 [B, 8, 1].
    """
    scales, minima, low = head[:, 4:8], head[:, 8:12], head[:, 12:16]
    scales = torch.cat((scales & 0x3F, low & 0x0F | scales >> 2 & 0x30), dim=1)
    minima = torch.cat((minima & 0x3F, low >> 4 | minima >> 2 & 0x30), dim=1)
    scale, minimum = _halves(head[:, :2]) * scales.float(), _halves(head[:, 2:4]) * minima.float()
    return scale[:, :, None], minimum[:, :, None]


# What the sixteen codes of IQ4_NL and IQ4_XS stand for (kvalues_iq4nl in ggml-common.h).
_IQ4_VALUES: Final = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]).float()

_UNPACK: dict[QuantType, Callable[[torch.Tensor], torch.Tensor]] = {
    QuantType.F32: _f32,
    QuantType.F16: _f16,
    QuantType.BF16: _bf16,
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
    QuantType.Q2_K: _q2_k,
    QuantType.Q3_K: _q3_k,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
    QuantType.IQ4_NL: _iq4_nl,
    QuantType.IQ4_XS: _iq4_xs,
}
