"""The gate of the MLP (SwiGLU and GeGLU, Shazeer 2020).

Used by models/.

Shapes: T tokens, M intermediate size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

if TYPE_CHECKING:
    from octavo_engine.models.spec import Activation


def gate_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up, for a gate and an up projection side by side: [T, 2 M] -> [T, M]."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)
