"""Decodes as CUDA graphs: a whole forward pass queued by one call, for a padded number of requests.

Built and called by gpu/steps.py. A graph computes on the tensors that it was captured with, wherever the numbers in
them come from: so there is one set of inputs, as large as the largest graph needs, and each graph reads its beginning.
Before a replay one copy brings what is new (tokens, positions, slots and contexts of all rows), and another the block
tables of those rows whose table is not that of the step before. Rows behind the last request have slot -1, which is
stored nowhere, and their logits are dropped.

A token need not come from the host: those that the step before draws are on the device, and taken from there.

Shapes: B requests of a graph, W blocks of the longest context, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from octavo_engine.gpu.accelerator import send
from octavo_engine.plan import StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.attention.triton import TritonAttention
    from octavo_engine.gpu.accelerator import Accelerator, Graph
    from octavo_engine.models.decoder import TorchDecoder
    from octavo_engine.plan import ScheduledRequest

_SMALL_SIZES: Final = (1, 2, 4, 8)
_STRIDE: Final = 16  # between larger ones: padding wastes little, and each graph takes a moment to capture
LARGEST: Final = 512  # requests; beyond, a step takes so long that launches hide behind it
_NOWHERE: Final = -1  # a slot
_NO_ADAPTERS: Final = StepPlan(0, ())
_IDS, _POSITIONS, _SLOTS, _SOURCES, _REQUESTS = range(5)  # rows of the inputs; that of requests is two


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens on the device, in place of those of a plan whose requests have one each."""

    tokens: torch.Tensor  # int32 [any]
    sources: Sequence[int]  # of each request, its place in them

    def take(self, sources: torch.Tensor) -> torch.Tensor:
        """Int64 [requests]; a token that could not be drawn becomes any that there is."""
        return self.tokens.index_select(0, sources).clamp_min(0).long()


def graph_sizes(max_requests: int) -> tuple[int, ...]:
    """The numbers of requests that graphs are captured for, rising; the last one holds as many as may run."""
    largest = min(max_requests, LARGEST)
    sizes = [size for size in (*_SMALL_SIZES, *range(_STRIDE, largest, _STRIDE)) if size < largest]
    return (*sizes, largest)


class DecodeGraphs:
    """Static inputs, and a graph for each of `graph_sizes`."""

    def __init__(
        self,
        model: TorchDecoder,
        attention: TritonAttention,
        accelerator: Accelerator,
        *,
        max_requests: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        """Capture them, the largest first.

        Args:
            model: what is computed.
            attention: its own, with the cache that it will have.
            accelerator: where.
            max_requests: that may run in one step.
            max_blocks: W.
            block_size: KV slots in a block.
        """
        self._model, self._attention, self._accelerator = model, attention, accelerator
        self._block_size = block_size
        self._sizes = graph_sizes(max_requests)
        most = self._sizes[-1]
        self._width = most + most % 2  # so that every row begins at a multiple of 16 bytes
        device = accelerator.device
        self._inputs = torch.zeros(_REQUESTS + 2, self._width, dtype=torch.int64, device=device)
        self._inputs[_SLOTS] = _NOWHERE
        self._requests = self._inputs[_REQUESTS:].view(-1).view(torch.int32)[: 3 * most].view(most, 3)
        self._tables = torch.zeros(most, max_blocks, dtype=torch.int64, device=device)
        self._table_of_row: list[tuple[int, ...]] = [()] * most  # what is in them
        self._rows = torch.arange(most, device=device)
        self._graphs: dict[int, Graph] = {
            size: accelerator.capture(lambda size=size: self._compute(size))  # type: ignore[misc] # mypy knows no defaults of lambdas
            for size in reversed(self._sizes)
        }

    def take(self, plan: StepPlan) -> bool:
        """Whether they can compute it: a token for each request, of no adapter, and no more requests than they have."""
        return len(plan.requests) <= self._sizes[-1] and all(
            len(request.token_ids) == 1 and not request.adapter for request in plan.requests
        )

    def forward(self, plan: StepPlan, drawn: Drawn | None = None) -> torch.Tensor:
        """Queue a step that they `take`.

        Args:
            plan: the requests, in any order.
            drawn: the tokens, if they are on the device.

        Returns:
            Logits after every token [len(plan.requests), V]: good until the next step.
        """
        requests = plan.requests
        num = len(requests)
        staged = self._accelerator.pinned(self._inputs.numel())
        self._fill(staged.numpy().reshape(self._inputs.shape), requests, drawn)
        self._accelerator.upload(self._inputs.view(-1), staged)
        self._update_tables(requests)
        if drawn is not None:
            self._inputs[_IDS, :num].copy_(drawn.take(self._inputs[_SOURCES, :num]))
        return self._graphs[self.size_for(num)].replay()[:num]

    def size_for(self, num_requests: int) -> int:
        """The graph for so many requests."""
        return next(size for size in self._sizes if size >= num_requests)

    def _compute(self, size: int) -> torch.Tensor:
        self._model.adapters.begin_step(_NO_ADAPTERS)
        self._attention.begin_decodes(self._inputs[_SLOTS, :size], self._tables[:size], self._requests[:size])
        ids, positions = self._inputs[_IDS, :size], self._inputs[_POSITIONS, :size]
        return self._model.forward(ids, positions, self._rows[:size])

    def _fill(self, inputs: np.ndarray, requests: Sequence[ScheduledRequest], drawn: Drawn | None) -> None:
        """Write every row, also for those behind the last request."""
        num = len(requests)
        positions = np.array([request.num_computed_tokens for request in requests])
        blocks = [request.block_ids[request.num_computed_tokens // self._block_size] for request in requests]
        inputs[:] = 0
        inputs[_SLOTS] = _NOWHERE
        inputs[_IDS, :num] = [request.token_ids[0] for request in requests]
        inputs[_POSITIONS, :num] = positions
        inputs[_SLOTS, :num] = np.array(blocks) * self._block_size + positions % self._block_size
        if drawn is not None:
            inputs[_SOURCES, :num] = drawn.sources
        contexts = inputs[_REQUESTS:].reshape(-1).view(np.int32)[: 3 * num].reshape(num, 3)
        contexts[:, 0], contexts[:, 1], contexts[:, 2] = np.arange(num), 1, positions + 1

    def _update_tables(self, requests: Sequence[ScheduledRequest]) -> None:
        """Send the block tables that changed; the scheduler hands out the same tuple until a table grows."""
        changed = [row for row, request in enumerate(requests) if request.block_ids is not self._table_of_row[row]]
        if not changed:
            return
        width = max(len(requests[row].block_ids) for row in changed)
        tables = np.zeros((len(changed), width), dtype=np.int64)
        for place, row in enumerate(changed):
            table = self._table_of_row[row] = requests[row].block_ids
            tables[place, : len(table)] = table
        rows, new = send(self._accelerator, (np.array(changed), tables))
        self._tables[:, :width].index_copy_(0, rows, new)
