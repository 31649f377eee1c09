"""The numbers of a LoRA adapter, out of its files. Called by runner.py when an adapter is loaded.

What the description (models/adapter.py) says of scales and of the order of rows is done here: the decoders add B A x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo_engine.weights.gguf_quants import dequantize
from octavo_engine.weights.stored import in_halves

if TYPE_CHECKING:
    from octavo_engine.models.adapter import Adapter, Place
    from octavo_engine.models.spec import DecoderSpec
    from octavo_engine.weights.gguf import TensorInfo


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a matrix [O, I]: B A, of rank R."""

    a: torch.Tensor  # float32 [R, I], contiguous, on the CPU
    b: torch.Tensor  # float32 [O, R], likewise; the scale is in it


def load_low_rank(adapter: Adapter, spec: DecoderSpec) -> dict[Place, LowRank]:
    """Read all of an adapter's tensors; queries and keys get the order of rows that the decoders have."""
    loaded = {}
    for place, pair in adapter.pairs.items():
        b = _read(pair.b) * pair.scale
        if adapter.pairs_adjacent and place[1] in ("q", "k"):
            b = in_halves(b, spec.head_dim)
        loaded[place] = LowRank(_read(pair.a), b.contiguous())
    return loaded


def _read(info: TensorInfo) -> torch.Tensor:
    with info.path.open("rb") as file:
        file.seek(info.offset)
        packed = torch.frombuffer(bytearray(file.read(info.num_bytes)), dtype=torch.uint8)
    return dequantize(packed, info.quant_type).view(info.shape)
