"""What a model asks of attention over the paged KV cache; reference.py computes it in plain torch.

One backend instance per model: it owns the KV cache of every layer. The runner calls `begin_step` once for each step,
the model's layers then `store` and `attend`. A backend knows nothing of requests beyond what the metadata says.

Shapes: T tokens of the step, R requests, N query heads, K KV heads, D head size, M longest block table of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The KV cache of one model."""

    num_layers: int
    num_blocks: int
    block_size: int  # slots (tokens) in a block
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRules:
    """What the scores of one model become before the softmax."""

    scale: float  # on query-key products
    windows: tuple[int | None, ...]  # of each layer: tokens that a query sees, itself among them; None: all before it
    softcap: float | None = None  # c: scaled scores become c * tanh(score / c), before the mask


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where the tokens of one step are and what they may look at. The tokens of a request are adjacent.

    The small per-request lists stay on the host, where the work of a step is laid out; tensors are on the device.
    """

    slot_mapping: torch.Tensor  # int64 [T]: the cache slot of each token, block * block_size + offset in it
    block_tables: (
        torch.Tensor
    )  # int64 [R, M]: each request's blocks in the order of positions; beyond its own: any value
    query_lens: tuple[int, ...]  # tokens that each request brings, >= 1
    context_lens: tuple[int, ...]  # tokens of each request including those of this step: its last position + 1


class AttentionBackend(ABC):
    """Causal attention with grouped query heads, over blocks of keys and values."""

    @abstractmethod
    def reserve(self, num_blocks: int) -> None:
        """Have a cache of so many blocks instead of the one so far, whose contents are lost."""

    @abstractmethod
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the KV of whole blocks in every layer, before the step stores any: (source, destination) block ids.

        No destination is a source too, and each is named once.
        """

    @abstractmethod
    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Lay out the work of a step, once for all layers."""

    @abstractmethod
    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the keys and values of the step's tokens, [T, K, D] each, to their slots."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attend from the step's queries [T, N, D] to their requests' cached tokens up to their own position.

        A layer with a window of W sees the last W of these. Softmax is float32 or better.

        Returns:
            [T, N, D], in the dtype of q.
        """
