"""The blocks of the paged KV cache: which are free, and how many block tables hold each of the others.

Called by kvcache/manager.py only. Knows block ids, not requests, tokens or tensors.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1, each free or held by one or more block tables."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))  # from the least to the most recently freed; taken from the left

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no block table holds."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks for one holder, the longest free first; the caller has seen that there are enough."""
        block_ids = tuple(self._free.popleft() for _ in range(num_blocks))
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int], num_holders: int) -> None:
        """Count so many more holders of blocks that are held."""
        for block_id in block_ids:
            self._ref_counts[block_id] += num_holders

    def is_shared(self, block_id: int) -> bool:
        """Whether more than one block table holds a block."""
        return self._ref_counts[block_id] > 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one holder of each block; a block without holders joins the free list, in the order given."""
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def check_integrity(self, num_holders: Mapping[int, int]) -> None:
        """Assert that the pool agrees with `num_holders`, the number of block tables that hold each used block."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert free.isdisjoint(num_holders), (
            f"blocks both free and in a block table: {sorted(free & num_holders.keys())}"
        )
        assert len(free) + len(num_holders) == self.num_blocks, (
            f"{len(free)} free + {len(num_holders)} used blocks are not the pool's {self.num_blocks}"
        )
        for block_id, ref_count in enumerate(self._ref_counts):
            holders = num_holders.get(block_id, 0)
            assert ref_count == holders, f"block {block_id} counts {ref_count} holders, {holders} block tables hold it"
