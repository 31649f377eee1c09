"""The gate of the MLP (SwiGLU, Shazeer 2020).

Used by models/.

Shapes: T tokens, M intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for a gate and an up projection side by side: [T, 2 M] -> [T, M]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
