"""What LoRA adapters add to matrix products on a GPU, by the kernels of kernels/lora.py. See lora.py, which chooses it.

The matrices of all loaded adapters that add to one place lie in a stack, filled up with zeros to the highest rank of
any of them (models/adapter.py's `stacked_rank`): two launches have the rows of every adapter of a step.

Shapes: T tokens of the step, I features in, O features out, L loaded adapters, R the rank of a stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

from octavo_engine.errors import ModelUnsupported
from octavo_engine.kernels import lora
from octavo_engine.layers.lora import rows_of_adapters
from octavo_engine.models.adapter import stacked_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.models.adapter import Place
    from octavo_engine.models.family import LayerRole
    from octavo_engine.plan import StepPlan
    from octavo_engine.weights.low_rank import LowRank


class TritonAdapters:
    """See lora.Adapters."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute in `dtype`, float16 or bfloat16, on `device`, a GPU or a CPU under Triton's interpreter."""
        self._dtype, self._device = dtype, device
        self._numbers: list[int] = []  # the adapter at each place of the stacks
        self._stacks: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}  # [L, R, I] and [L, O, R]
        self._tiles: lora.Tiles | None = None  # of the step; None: no row has an adapter

    def load(self, adapter: int, pairs: Mapping[Place, LowRank]) -> None:
        """See lora.Adapters.

        Raises:
            ModelUnsupported: the kernels cannot read its matrices; none of it was taken.
        """
        for (layer, role), pair in pairs.items():
            features, columns = pair.a.shape[1], pair.b.shape[0]
            if features % 16 or columns % 16:
                raise ModelUnsupported(
                    f"the adapter adds to {role} of layer {layer}, which is {columns} x {features}: the GPU kernels "
                    "have multiples of 16; use --device cpu"
                )
        rank = stacked_rank(max(len(pair.a) for pair in pairs.values()))
        for place in self._stacks.keys() | pairs.keys():
            new = pairs.get(place)
            a, b = self._stacks[place] if place in self._stacks else self._none(new)
            more = max(0, rank - a.shape[1])
            a, b = F.pad(a, (0, 0, 0, more, 0, 1)), F.pad(b, (0, more, 0, 0, 0, 1))  # one adapter more, of zeros
            if new is not None:
                a[-1, : len(new.a)], b[-1, :, : len(new.a)] = new.a, new.b
            self._stacks[place] = a, b
        self._numbers.append(adapter)

    def unload(self, adapter: int) -> None:
        """See lora.Adapters."""
        place = self._numbers.index(adapter)
        del self._numbers[place]
        if not self._numbers:
            self._stacks.clear()
        left = [number for number in range(len(self._numbers) + 1) if number != place]
        self._stacks = {where: (a[left], b[left]) for where, (a, b) in self._stacks.items()}

    def begin_step(self, plan: StepPlan) -> None:
        """See lora.Adapters."""
        rows = {self._numbers.index(adapter): its_rows for adapter, its_rows in rows_of_adapters(plan).items()}
        self._tiles = lora.tile_rows(rows, self._device) if rows else None

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, columns: Mapping[LayerRole, slice]) -> torch.Tensor:
        """See lora.Adapters."""
        if self._tiles is None:
            return y
        for role, place in columns.items():
            if (stack := self._stacks.get((layer, role))) is not None:
                lora.add_low_rank(y[:, place], x, *stack, self._tiles)
        return y

    def _none(self, pair: LowRank | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Stacks for a place to which none of the loaded adapters adds."""
        assert pair is not None, "a place without a stack is one of the new adapter's"
        count, features, columns = len(self._numbers), pair.a.shape[1], pair.b.shape[0]
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        return empty.new_zeros((count, 0, features)), empty.new_zeros((count, columns, 0))
