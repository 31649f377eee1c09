"""Choosing the next tokens of all requests of a step at once. Called by runner.py.

It knows logits and sampling parameters, and nothing of models or requests' histories.

Order of the rules: temperature, min-p, top-k, top-p (as vLLM has it); each works on what the one before left. A draw
takes one uniform number from (seed, choice, position) and inverts the cumulative distribution with it. So a token
depends on its own row of logits, its parameters, its seed, its choice (which of n answers) and its position, and on
nothing else in the batch.

Shapes: S rows, one for each token to choose; V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo_engine.plan import RequestResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.plan import SamplingParams, ScheduledRequest

_UNIFORM_BITS = 52  # fewer than float64's 53, so that uniform * total never rounds up to total


@dataclass(frozen=True, slots=True)
class Draw:
    """How the token of one row is chosen."""

    sampling: SamplingParams
    uniform: float  # in [0, 1)


def draw_for(request: ScheduledRequest, engine_seed: int, choice: int = 0) -> Draw:
    """The draw of the token after the last one of `request`, for one of its choices."""
    sampling = request.sampling
    seed = str(sampling.seed) if sampling.seed is not None else f"{engine_seed}/{request.request_id}"
    position = request.num_computed_tokens + len(request.token_ids)
    digest = hashlib.blake2b(f"{seed}#{choice}@{position}".encode(), digest_size=8).digest()
    return Draw(sampling, (int.from_bytes(digest) >> (64 - _UNIFORM_BITS)) / 2**_UNIFORM_BITS)


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[RequestResult]:
    """Choose a token for each row.

    Args:
        logits: [S, V], any floating dtype. -inf forbids a token; a row with NaN, +inf or nothing but -inf is an error.
        draws: S of them.

    Returns:
        A token for each row, or its error.
    """
    logits = logits.float()
    highest, token_ids = logits.max(dim=-1)  # NaN counts as the highest
    random_rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if random_rows:
        token_ids[random_rows] = _sample_random(
            logits[random_rows] - highest[random_rows, None], [draws[row] for row in random_rows]
        )
    return [
        RequestResult(token_id=token_id)
        if is_finite
        else RequestResult(error="the model computed NaN or infinite logits")
        for token_id, is_finite in zip(token_ids.tolist(), highest.isfinite().tolist(), strict=True)
    ]


def _sample_random(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Sample from float32 logits [S, V] whose highest is 0 in each row: int64 [S]. Rows of NaN give any token."""
    device = logits.device
    params = [draw.sampling for draw in draws]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # A temperature too small for float32 means what it tends to: the most likely token.
    temperatures = column([p.temperature for p in params]).clamp_(min=torch.finfo(torch.float32).tiny)
    probs = logits.div_(temperatures).exp_()
    if any(p.min_p > 0 for p in params):
        probs.masked_fill_(probs < column([p.min_p for p in params]), 0.0)  # the highest is exp(0) = 1 here
    for row, p in enumerate(params):
        if p.top_k > 0 or p.top_p < 1:
            _truncate(probs[row], p)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    uniforms = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64, device=device)[:, None]
    chosen = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(-1)
    return chosen.clamp_(max=logits.shape[1] - 1)


def _truncate(probs: torch.Tensor, sampling: SamplingParams) -> None:
    """Zero in place what top-k and top-p exclude, in one row of unnormalised probabilities, float32 [V].

    Of equally likely tokens the lower ids stay. Only tokens above a floor that surely excludes the others are sorted.
    """
    if 0 < sampling.top_k < len(probs):
        floor = probs.topk(sampling.top_k).values[-1]
    else:
        # Were a token below this floor in the nucleus, the at most V tokens no likelier than it would weigh
        # less than 1 - top_p, and so those before it would reach top_p without it.
        floor = probs.sum(dtype=torch.float64) * ((1 - sampling.top_p) / len(probs))
    candidates = (probs >= floor).nonzero().squeeze(-1)
    ordered, order = probs[candidates].sort(descending=True, stable=True)
    ordered = ordered[: sampling.top_k or None]
    if sampling.top_p < 1:
        total = ordered.sum(dtype=torch.float64) if sampling.top_k else probs.sum(dtype=torch.float64)
        before = ordered.cumsum(dim=0, dtype=torch.float64) - ordered
        ordered = ordered[: max(1, int((before < sampling.top_p * total).sum()))]
    probs.zero_()
    probs[candidates[order[: len(ordered)]]] = ordered
