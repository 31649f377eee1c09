"""What LoRA adapters add to matrix products, in torch: rows of several adapters in one step, and rows of none.

Used by models/decoder.py; steps.py says which rows are whose. The rows of a step are grouped by their adapter, and each
group is multiplied with the two small matrices of its own (Hu et al. 2021). As they are packed as all others
(linear.py), a request's float32 result does not depend on the requests that share its group.

Shapes: T tokens of the step, I features in, O features out, R rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo_engine.layers.linear import Linear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.models.adapter import Place
    from octavo_engine.models.family import LayerRole
    from octavo_engine.plan import StepPlan
    from octavo_engine.weights.low_rank import LowRank


@dataclass(frozen=True, slots=True)
class _Pair:
    """B A."""

    a: Linear  # [T, I] -> [T, R]
    b: Linear  # [T, R] -> [T, O]


class TorchAdapters:
    """The loaded adapters of a model, and which of them the rows of the present step have."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute in `dtype` on `device`."""
        self._dtype, self._device = dtype, device
        self._loaded: dict[int, dict[Place, _Pair]] = {}
        self._groups: list[tuple[dict[Place, _Pair], torch.Tensor]] = []  # with the rows of each, int64

    def load(self, adapter: int, pairs: Mapping[Place, LowRank]) -> None:
        """Take an adapter under its number."""
        self._loaded[adapter] = {
            place: _Pair(*(Linear(matrix.to(self._device, self._dtype)) for matrix in (pair.a, pair.b)))
            for place, pair in pairs.items()
        }

    def unload(self, adapter: int) -> None:
        """Forget it."""
        del self._loaded[adapter]

    def begin_step(self, plan: StepPlan) -> None:
        """Find the rows of each adapter: the tokens of all requests come in the order of the plan."""
        rows: dict[int, list[int]] = {}
        start = 0
        for request in plan.requests:
            end = start + len(request.token_ids)
            if request.adapter and self._loaded:  # a draft model has none of its own
                rows.setdefault(request.adapter, []).extend(range(start, end))
            start = end
        self._groups = [
            (self._loaded[adapter], torch.tensor(its_rows, device=self._device)) for adapter, its_rows in rows.items()
        ]

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
        for pairs, rows in self._groups:
            inputs = None
            for role, place in columns.items():
                if (pair := pairs.get((layer, role))) is not None:
                    inputs = x[rows] if inputs is None else inputs
                    y[:, place].index_add_(0, rows, pair.b(pair.a(inputs)))
        return y
