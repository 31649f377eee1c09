"""What the CPU library computes in, and the bytes that it then keeps: known before it or torch is loaded.

Called by planning.py and sizing.py, and by decoder.py, which says what each way to compute is. The sizes are those of
native/matrix.h, attention.h and decoder.h; a test compares them with what the library says of itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.models.spec import DecoderSpec

Compute = Literal["float32", "bfloat16", "int8"]

# Quantised types that int8 activations are multiplied with as they are, and the bytes that the library packs a group of
# 32 numbers into: 4 bits a number stay 4 bits, more become 8; a float16 scale; a float16 minimum where there is one.
NATIVE_GROUP_BYTES: Final = {
    QuantType.Q4_0: 16 + 2,
    QuantType.Q4_1: 16 + 2 + 2,
    QuantType.Q5_0: 32 + 2,
    QuantType.Q5_1: 32 + 2 + 2,
    QuantType.Q8_0: 32 + 2,
}
_GROUP: Final = 32  # numbers that share a scale
_OUTPUTS: Final = 32  # of a matrix, that are packed together
_TILE_SLOTS: Final = 8  # of keys, that are kept together
_HEAD_STEP: Final = 16  # a head's numbers in the KV cache are padded to a multiple


def matrix_bytes(compute: Compute, quant_type: QuantType, shape: Sequence[int]) -> int:
    """Bytes of a packed matrix [outputs, inputs] that a file has in `quant_type`."""
    *_, outputs, inputs = shape
    if compute == "float32":
        row_bytes = 4 * inputs
    elif compute == "int8" and quant_type in NATIVE_GROUP_BYTES:
        row_bytes = inputs // _GROUP * NATIVE_GROUP_BYTES[quant_type]
    else:
        row_bytes = 2 * _round_up(inputs, 2)
    return _round_up(outputs, _OUTPUTS) * row_bytes


def cache_dtype(compute: Compute) -> str:
    """The type of cached keys and values."""
    return "float32" if compute == "float32" else "float16"


def kv_block_bytes(compute: Compute, spec: DecoderSpec, block_size: int) -> int:
    """Bytes of one block of the KV cache in all layers."""
    slots = _round_up(block_size, _TILE_SLOTS) + block_size  # of keys and of values
    itemsize = 4 if compute == "float32" else 2
    return spec.num_layers * spec.num_kv_heads * slots * _round_up(spec.head_dim, _HEAD_STEP) * itemsize


def token_bytes(spec: DecoderSpec) -> int:
    """Bytes of what a step keeps of each of its tokens from phase to phase.

    The inputs of three products, each as float32, bfloat16 and int8 with three numbers a group, and as float32 the
    residual, a branch of it, queries with keys and values, and what attention gives.
    """
    queries = spec.num_heads * spec.head_dim
    inputs = sum(_round_up(size, _GROUP) for size in (spec.hidden_size, queries, spec.intermediate_size))
    floats = 2 * spec.hidden_size + 2 * queries + 2 * spec.num_kv_heads * spec.head_dim
    return inputs * (4 + 2 + 1) + inputs // _GROUP * 12 + floats * 4


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to
