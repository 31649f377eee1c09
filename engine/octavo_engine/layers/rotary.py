"""Rotary position embeddings (Su et al. 2021), pairing the two halves of a head as Hugging Face models do.

Used by models/. Angles and rotation are float32 whatever the compute dtype.

Shapes: T tokens, N heads, D head size, P positions.
"""

from __future__ import annotations

import torch


class RotaryEmbedding:
    """A table of cosines and sines for every position the engine may see."""

    def __init__(self, *, head_dim: int, theta: float, num_positions: int, device: torch.device) -> None:
        inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
        angles = torch.arange(num_positions, device=device).float()[:, None] * inverse_frequency
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)  # [P, D]: cosines, then sines

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for the tokens of a step, looked up once for all layers: [T] -> two of [T, 1, D / 2]."""
        cos, sin = self._cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[d], x[d + D / 2]) by its angle: [T, N, D] -> [T, N, D], the dtype kept."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
