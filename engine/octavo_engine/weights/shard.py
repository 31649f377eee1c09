"""Which part of each tensor one of several ranks has (Megatron-LM, Shoeybi et al. 2019). No torch here.

Called by stored.py, which hands out that part alone. What makes heads and the MLP's middle is cut by rows, what takes
them by columns, so that a layer needs two sums over the ranks and nothing else. Norms are on every rank.

sizing.tensor_parallel_sizes says which numbers of ranks divide a model; this module relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from octavo_engine.models.family import LayerRole, ModelRole
    from octavo_engine.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a tensor's rows or columns."""

    dim: int  # 0: rows, 1: columns
    start: int
    stop: int  # beyond the last row where a vocabulary does not divide: the rank's share is filled up with zeros


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` ranks."""

    rank: int = 0
    size: int = 1

    def part(self, role: ModelRole | LayerRole, shape: tuple[int, ...], spec: DecoderSpec) -> Part:
        """What this rank has of the whole tensor of that shape."""
        match role:
            case "embedding" | "output":
                rows = -(-shape[0] // self.size)
                return Part(0, self.rank * rows, (self.rank + 1) * rows)
            case "k" | "v" | "k_bias" | "v_bias":  # with fewer KV heads than ranks, several have the same one
                first = self.rank * spec.num_kv_heads // self.size
                return Part(0, first * spec.head_dim, (first + spec.share(self.size).num_kv_heads) * spec.head_dim)
            case "q" | "q_bias" | "gate" | "up":
                return self._equal(0, shape)
            case "o" | "down":
                return self._equal(1, shape)
            case _:
                return Part(0, 0, shape[0])

    def _equal(self, dim: int, shape: tuple[int, ...]) -> Part:
        width, rest = divmod(shape[dim], self.size)
        assert rest == 0, "a number of ranks that does not divide the model is refused before weights are read"
        return Part(dim, self.rank * width, (self.rank + 1) * width)


WHOLE: Final = Shard()  # of a model on one device
