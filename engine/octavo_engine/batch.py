"""A StepPlan as tensors: where the functional plan meets the device. Called by runner.py.

It knows how tokens and blocks are laid out, and nothing about models or sampling.

Shapes: T tokens of the step, R requests, S tokens to get logits after, M longest block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo_engine.attention.base import AttentionMetadata

if TYPE_CHECKING:
    from octavo_engine.plan import ScheduledRequest, StepPlan


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step, on the device; the tokens of all requests in the order of the plan."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    logits_rows: torch.Tensor  # int64 [S]
    attention: AttentionMetadata


def build_step(plan: StepPlan, *, block_size: int, device: torch.device) -> StepTensors:
    """Lay out a plan that has at least one request."""
    requests = plan.requests
    query_lens = tuple(len(request.token_ids) for request in requests)
    context_lens = tuple(
        request.num_computed_tokens + length for request, length in zip(requests, query_lens, strict=True)
    )
    width = max(len(request.block_ids) for request in requests)
    block_tables = np.zeros((len(requests), width), dtype=np.int64)
    for row, request in enumerate(requests):
        assert len(request.block_ids) * block_size >= context_lens[row], "the block table is too short for the tokens"
        block_tables[row, : len(request.block_ids)] = request.block_ids
    ends = np.cumsum(query_lens)
    request_of_token = np.repeat(np.arange(len(requests)), query_lens)
    positions = np.arange(ends[-1]) + (np.array(context_lens) - ends)[request_of_token]
    slots = block_tables[request_of_token, positions // block_size] * block_size + positions % block_size

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return StepTensors(
        input_ids=on_device(_token_ids(requests)),
        positions=on_device(positions),
        logits_rows=on_device(np.array(plan.logits_rows, dtype=np.int64)),
        attention=AttentionMetadata(
            slot_mapping=on_device(slots),
            block_tables=on_device(block_tables),
            query_lens=query_lens,
            context_lens=context_lens,
        ),
    )


def _token_ids(requests: tuple[ScheduledRequest, ...]) -> np.ndarray:
    return np.array([token for request in requests for token in request.token_ids], dtype=np.int64)
