"""The blocks of the paged KV cache: which are free, and how many block tables hold each of the others.

Called by kvcache/manager.py only. Knows block ids, not requests, tokens or tensors.

A free block may still be named by the prefix cache, and then its KV can be had back. So blocks without a name are taken
first, of these the one freed last (its memory is touched and warm), and then the named ones, the longest free first.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from octavo_engine.kvcache.prefix import PrefixIndex


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1, each free or held by one or more block tables."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self._index = index
        self._ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # in the order in which they are taken

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no block table holds, whether the prefix cache names them or not."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Take blocks for one holder, to be written; the caller has seen that there are enough."""
        block_ids = tuple(self._free.popitem(last=False)[0] for _ in range(num_blocks))
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            self._index.discard(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int], num_holders: int = 1) -> None:
        """Count so many more holders of blocks that are held, or free and named."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += num_holders

    def is_free(self, block_id: int) -> bool:
        """Whether no block table holds a block."""
        return self._ref_counts[block_id] == 0

    def is_shared(self, block_id: int) -> bool:
        """Whether more than one block table holds a block."""
        return self._ref_counts[block_id] > 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one holder of each block; those without holders become free in the order given."""
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._index:
                    self._free.move_to_end(block_id, last=False)

    def check_integrity(self, num_holders: Mapping[int, int]) -> None:
        """Assert that the pool agrees with `num_holders`, the number of block tables that hold each used block."""
        assert self._free.keys().isdisjoint(num_holders), (
            f"blocks both free and in a block table: {sorted(self._free.keys() & num_holders.keys())}"
        )
        assert len(self._free) + len(num_holders) == self.num_blocks, (
            f"{len(self._free)} free + {len(num_holders)} used blocks are not the pool's {self.num_blocks}"
        )
        for block_id, ref_count in enumerate(self._ref_counts):
            holders = num_holders.get(block_id, 0)
            assert ref_count == holders, f"block {block_id} counts {ref_count} holders, {holders} block tables hold it"
        assert all((a in self._index) <= (b in self._index) for a, b in pairwise(self._free)), (
            "a block that can be had back is to be taken before one that cannot"
        )
