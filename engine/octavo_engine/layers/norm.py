"""Root-mean-square normalisation (Zhang and Sennrich 2019).

Used by models/. Computed in float32 whatever the compute dtype.

Shapes: H the size of what is normalised: the hidden size, or the head size for query and key heads.
"""

from __future__ import annotations

import torch


class RMSNorm:
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        """Keep the weight float32 [H]; `dtype` is what comes out."""
        self._weight = weight
        self._eps = eps
        self._dtype = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Any dtype [..., H] -> dtype [..., H]."""
        x = x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)
        return (x * scale).mul_(self._weight).to(self._dtype)
