"""Arithmetic that several kernels share: e4m3 without e4m3 instructions, tanh, the two gates.

FP8 e4m3 (OCP 8-bit floating point, 2023; torch.float8_e4m3fn) is read and written by integer arithmetic, so that every
GPU has it; only the multiplication of two e4m3 matrices needs tensor cores that know it (launch.Target.has_fp8).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(codes):
    """uint8 of any shape -> float16, exactly; the two codes of NaN become 480.

    A float16 has an exponent one bit wider, with 8 more for a bias: shifted into place, the number is 2**8 too small,
    denormals too.
    """
    bits = codes.to(tl.uint16)
    halves = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return halves.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode_e4m3(numbers):
    """float32 of any shape -> uint8, to the nearest, ties to even; what exceeds 448 becomes 448, and NaN stays NaN."""
    bits = numbers.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(numbers), 448.0)
    magnitude_bits = magnitude.to(tl.uint32, bitcast=True)
    # Keep three bits of the fraction, round on what is cut off, and go from a bias of 127 to one of 7.
    normal = ((magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the codes count in steps of 2**-9, which is what a float32 near 2**14 can tell apart.
    denormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    codes = tl.where(magnitude < 0.015625, denormal, normal)
    codes = tl.where(numbers == numbers, codes, 0x7F)  # noqa: PLR0124 - NaN is the number that differs from itself
    return (sign | codes).to(tl.uint8)


@triton.jit
def tanh(x):
    """Of float32; never overflows."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def silu(x):
    """X * sigmoid(x), of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """GELU by its usual approximation with tanh, of float32."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
