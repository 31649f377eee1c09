"""The ways in which numbers are stored: ggml's type numbers, and how each packs its numbers into blocks. No torch here.

The one place for these names and sizes: readers, dequantisers, kernels and the memory arithmetic all use them.

Numbers: ggml's enum ggml_type (ggml.h). Sizes: its block_* structs (ggml-common.h).
"""

from __future__ import annotations

import enum


class QuantType(enum.IntEnum):
    """How a tensor's numbers are stored: the types of ggml that this engine can dequantise."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Numbers that share one scale and are stored together."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one such block."""
        return _BLOCKS[self][1]


_BLOCKS = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.BF16: (1, 2),
    QuantType.Q4_0: (32, 2 + 16),
    QuantType.Q4_1: (32, 2 + 2 + 16),
    QuantType.Q5_0: (32, 2 + 4 + 16),
    QuantType.Q5_1: (32, 2 + 2 + 4 + 16),
    QuantType.Q8_0: (32, 2 + 32),
    QuantType.Q2_K: (256, 16 + 64 + 2 + 2),
    QuantType.Q3_K: (256, 32 + 64 + 12 + 2),
    QuantType.Q4_K: (256, 2 + 2 + 12 + 128),
    QuantType.Q5_K: (256, 2 + 2 + 12 + 32 + 128),
    QuantType.Q6_K: (256, 128 + 64 + 16 + 2),
    QuantType.IQ4_NL: (32, 2 + 16),
    QuantType.IQ4_XS: (256, 2 + 2 + 4 + 128),
}

# ggml's names of the types that are refused, so that the message can say more than a number.
OTHER_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


class RawType(enum.Enum):
    """What safetensors files have besides, which are numbers only together with other tensors (quantized.py)."""

    I32 = "I32"
    I64 = "I64"
    F8_E4M3 = "F8_E4M3"

    @property
    def num_bytes(self) -> int:
        """Of one element."""
        return {RawType.I32: 4, RawType.I64: 8, RawType.F8_E4M3: 1}[self]
