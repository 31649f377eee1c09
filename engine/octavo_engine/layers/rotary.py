"""Rotary position embeddings (Su et al. 2021), pairing the two halves of a head as Hugging Face models do.

Used by models/decoder.py and the C++ decoder, which take their tables from here. Angles and rotation are float32
whatever the compute dtype. The arithmetic of the scalings is that of transformers, in its order, so that results are
equal.

Shapes: T tokens, N heads, D head size, P positions.
"""

from __future__ import annotations

import math

import torch

from octavo_engine.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    StoredFactors,
    YarnScaling,
)


def rotary_table(
    rope: Rope, *, head_dim: int, num_positions: int, stored_factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for every position the engine may see, with the attention factor in them.

    Args:
        rope: what to compute.
        head_dim: D.
        num_positions: P, the longest context that will be served: some scalings depend on it.
        stored_factors: float32 [D / 2], from the weights, where the scaling is StoredFactors.

    Returns:
        Two float32 [P, D / 2] on the CPU.
    """
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    magnitude = 1.0
    match rope.scaling:
        case None:
            frequencies = 1.0 / rope.theta**exponents
        case LinearScaling(factor):
            frequencies = 1.0 / rope.theta**exponents / factor
        case DynamicScaling() as scaling:
            frequencies = 1.0 / _dynamic_base(rope.theta, scaling, head_dim, num_positions) ** exponents
        case Llama3Scaling() as scaling:
            frequencies = _llama3(1.0 / rope.theta**exponents, scaling)
        case YarnScaling(attention_factor=magnitude) as scaling:
            frequencies = _yarn(rope.theta**exponents, scaling, rope.theta, head_dim)
        case LongRopeScaling(attention_factor=magnitude) as scaling:
            is_long = num_positions > scaling.original_context
            factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
            frequencies = 1.0 / (factors * rope.theta**exponents)
        case StoredFactors():
            assert stored_factors is not None, "the factors are in the weights"
            frequencies = 1.0 / rope.theta**exponents / stored_factors.cpu()
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[d], x[d + D / 2]) by its angle.

    Args:
        x: [T, N, D].
        cos: float32 [T, 1, D / 2], the rows of the table at the tokens' positions.
        sin: the same.

    Returns:
        float32 [T, N, D].
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _dynamic_base(theta: float, scaling: DynamicScaling, head_dim: int, num_positions: int) -> float:
    length = max(num_positions, scaling.original_context)
    stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    return float(theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    is_long = wavelengths > scaling.original_context / low
    is_short = wavelengths < scaling.original_context / high
    return torch.where(is_long, frequencies / scaling.factor, torch.where(is_short, frequencies, between))


def _yarn(inverse: torch.Tensor, scaling: YarnScaling, theta: float, head_dim: int) -> torch.Tensor:
    """Frequencies from their inverses [D / 2]."""

    def dimension(rotations: float) -> float:
        """The dimension whose frequency turns so often over the original context."""
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * inverse) * (1 - kept) + 1.0 / inverse * kept
