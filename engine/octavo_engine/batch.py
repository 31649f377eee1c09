"""A StepPlan as tensors: where the functional plan meets the device. Called by steps.py and gpu/steps.py.

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
    from collections.abc import Callable, Sequence

    from octavo_engine.plan import ScheduledRequest, StepPlan

    Send = Callable[[Sequence[np.ndarray]], Sequence[torch.Tensor]]  # to the device


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step, on the device; the tokens of all requests in the order of the plan."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    logits_rows: torch.Tensor  # int64 [S]
    attention: AttentionMetadata


def build_step(plan: StepPlan, *, block_size: int, device: torch.device) -> StepTensors:
    """Lay out a plan that has at least one request, on a device that need not be spared waiting."""
    return send_step(
        plan, block_size=block_size, send=lambda pieces: [torch.from_numpy(piece).to(device) for piece in pieces]
    )


def send_step(plan: StepPlan, *, block_size: int, send: Send) -> StepTensors:
    """Lay out a plan that has at least one request; `send` gets all int64 arrays at once."""
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
    logits_rows = np.array(plan.logits_rows, dtype=np.int64)
    input_ids, on_device_positions, rows, slot_mapping, tables = send(
        (_token_ids(requests), positions, logits_rows, slots, block_tables)
    )
    return StepTensors(
        input_ids=input_ids,
        positions=on_device_positions,
        logits_rows=rows,
        attention=AttentionMetadata(
            slot_mapping=slot_mapping, block_tables=tables, query_lens=query_lens, context_lens=context_lens
        ),
    )


def _token_ids(requests: tuple[ScheduledRequest, ...]) -> np.ndarray:
    return np.array([token for request in requests for token in request.token_ids], dtype=np.int64)
