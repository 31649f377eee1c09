"""All kernels: what the compile matrix builds and docs/kernels.md describes."""

from __future__ import annotations

from typing import Final

from octavo_engine.kernels.activation import GATE_AND_MUL
from octavo_engine.kernels.attention import ATTEND, COMBINE
from octavo_engine.kernels.cache import STORE_KV
from octavo_engine.kernels.lora import ADD_EXPANDED, REDUCE_RANK
from octavo_engine.kernels.matmul_fp8 import MULTIPLY_FP8, QUANTIZE_GROUPS, QUANTIZE_ROWS
from octavo_engine.kernels.matmul_gguf import MULTIPLY_GGUF
from octavo_engine.kernels.matmul_packed import MULTIPLY_PACKED
from octavo_engine.kernels.norm import ADD_RMS_NORM, RMS_NORM
from octavo_engine.kernels.rotary import ROTATE
from octavo_engine.kernels.sampling import SAMPLE

KERNELS: Final = (
    STORE_KV,
    ADD_RMS_NORM,
    RMS_NORM,
    ROTATE,
    GATE_AND_MUL,
    ATTEND,
    COMBINE,
    MULTIPLY_PACKED,
    QUANTIZE_ROWS,
    QUANTIZE_GROUPS,
    MULTIPLY_FP8,
    MULTIPLY_GGUF,
    REDUCE_RANK,
    ADD_EXPANDED,
    SAMPLE,
)
