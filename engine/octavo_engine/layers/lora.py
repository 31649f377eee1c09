"""What LoRA adapters add to matrix products: rows of several adapters in one step, and rows of none.

Used by models/decoder.py; steps.py says which rows are whose. In torch the rows of a step are grouped by their adapter,
and each group is multiplied with the two small matrices of its own (Hu et al. 2021). As they are packed as all others
(linear.py), a request's float32 result does not depend on the requests that share its group. A GPU has kernels for all
groups at once (lora_triton.py), but not in float32, as with attention.

Shapes: T tokens of the step, I features in, O features out, R rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from octavo_engine.layers.linear import Linear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.models.adapter import Place
    from octavo_engine.models.family import LayerRole
    from octavo_engine.plan import StepPlan
    from octavo_engine.weights.low_rank import LowRank


class Adapters(Protocol):
    """The loaded adapters of a model, and which of them the rows of the present step have."""

    def load(self, adapter: int, pairs: Mapping[Place, LowRank]) -> None:
        """Take an adapter under its number."""
        ...

    def unload(self, adapter: int) -> None:
        """Forget it."""
        ...

    def begin_step(self, plan: StepPlan) -> None:
        """Find the rows of each adapter."""
        ...

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, columns: Mapping[LayerRole, slice]) -> torch.Tensor:
        """Add B A x to the rows that have an adapter.

        Args:
            y: a product of x [T, O], changed in place.
            x: [T, I].
            layer: whose product it is.
            columns: where in y each matrix has its outputs.

        Returns:
            y.
        """
        ...


def adapters_on(device: torch.device, dtype: torch.dtype) -> Adapters:
    """Kernels where there is a GPU; torch elsewhere, and for float32."""
    if device.type == "cuda" and dtype != torch.float32:
        from octavo_engine.layers.lora_triton import TritonAdapters  # noqa: PLC0415 - Triton is not there without a GPU

        return TritonAdapters(dtype, device)
    return TorchAdapters(dtype, device)


def rows_of_adapters(plan: StepPlan) -> dict[int, list[int]]:
    """The rows of each adapter that the plan names: the tokens of all requests come in its order."""
    rows: dict[int, list[int]] = {}
    start = 0
    for request in plan.requests:
        end = start + len(request.token_ids)
        if request.adapter:
            rows.setdefault(request.adapter, []).extend(range(start, end))
        start = end
    return rows


@dataclass(frozen=True, slots=True)
class _Pair:
    """B A."""

    a: Linear  # [T, I] -> [T, R]
    b: Linear  # [T, R] -> [T, O]


class TorchAdapters:
    """See Adapters."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute in `dtype` on `device`."""
        self._dtype, self._device = dtype, device
        self._loaded: dict[int, dict[Place, _Pair]] = {}
        self._groups: list[tuple[dict[Place, _Pair], torch.Tensor]] = []  # with the rows of each, int64

    def load(self, adapter: int, pairs: Mapping[Place, LowRank]) -> None:
        """See Adapters."""
        self._loaded[adapter] = {
            place: _Pair(*(Linear(matrix.to(self._device, self._dtype)) for matrix in (pair.a, pair.b)))
            for place, pair in pairs.items()
        }

    def unload(self, adapter: int) -> None:
        """See Adapters."""
        del self._loaded[adapter]

    def begin_step(self, plan: StepPlan) -> None:
        """See Adapters."""
        self._groups = [
            (self._loaded[adapter], torch.tensor(rows, device=self._device))
            for adapter, rows in rows_of_adapters(plan).items()
        ]

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, columns: Mapping[LayerRole, slice]) -> torch.Tensor:
        """See Adapters."""
        for pairs, rows in self._groups:
            inputs = None
            for role, place in columns.items():
                if (pair := pairs.get((layer, role))) is not None:
                    inputs = x[rows] if inputs is None else inputs
                    y[:, place].index_add_(0, rows, pair.b(pair.a(inputs)))
        return y
