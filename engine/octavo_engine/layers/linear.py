"""Matrix products with weights that are packed once for the kernel that will run them.

Used by models/. Where ranks share a model, a matrix is one rank's part: of its rows in a Linear, whose output is then a
part of the whole one, and of its columns in a PartialLinear, whose output is summed over the ranks.

On a CPU with oneDNN the weight is packed ("reordered") when the layer is built. Besides the speed, that kernel computes
a row the same way however many rows there are: a request's float32 result does not depend on the batch it is in. (MKL,
which `F.linear` would call, takes another path for fewer than four rows.) Elsewhere it is `F.linear`.

Shapes: T tokens, I features in, O features out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

if TYPE_CHECKING:
    from octavo_engine.parallel import Communicator

# torch has no public name for oneDNN's packed weights; these are what its own compiler emits.
_pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - see above
_packed_linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - see above
_packs_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported  # noqa: SLF001 - see above

# How many rows the packing should suit. With one row oneDNN would choose a matrix-vector layout, slower for all others.
_PACKED_FOR_ROWS = 32


class Linear:
    """y = x W^T + b."""

    def __init__(self, *weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take one matrix, or several [O_i, I] that read the same input and are multiplied as one [sum O_i, I].

        Args:
            weights: the matrices.
            bias: [sum O_i], in their dtype.
        """
        self._bias = bias
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._packed = _can_pack(weight)
        self._weight = _pack(weight, _PACKED_FOR_ROWS) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]."""
        if self._packed:
            y: torch.Tensor = _packed_linear(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


class PartialLinear:
    """y = x W^T + b, where each rank has some of the columns of W and the same ones of x."""

    def __init__(self, weight: torch.Tensor, *, ranks: Communicator, bias: torch.Tensor | None = None) -> None:
        """Take this rank's columns [O, I]; the bias [O] is added once, by rank 0."""
        self._linear = Linear(weight, bias=bias if ranks.rank == 0 else None)
        self._ranks = ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's [T, I] -> the sum over all ranks, [T, O]."""
        return self._ranks.sum(self._linear(x))


def _can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN is here and multiplies this type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(_packs_bfloat16()))
