"""Block tables: KV slots for tokens, in whole blocks out of the pool.

Called by the scheduler only. Knows numbers of tokens, not what they are, and no tensors. A block table is a tuple of
block ids: its i-th block holds the KV of the tokens at positions [i * block_size, (i + 1) * block_size). Paged KV as in
Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from octavo_engine.kvcache.pool import BlockPool

if TYPE_CHECKING:
    from collections.abc import Iterable


class KVCacheManager:
    """Allocates and frees the block tables of requests. The tables themselves are kept by whoever asked for them."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size  # KV slots in a block
        self.num_blocks = num_blocks
        self._pool = BlockPool(num_blocks)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that are in a block table; times block_size, the allocated slots."""
        return self.num_blocks - self._pool.num_free_blocks

    def allocate(
        self, block_ids: tuple[int, ...], num_tokens: int, *, num_spare_blocks: int = 0
    ) -> tuple[int, ...] | None:
        """Extend a block table (empty for a new request) until it has slots for `num_tokens` tokens.

        Returns the longer table; None, with nothing changed, if that left less than `num_spare_blocks` blocks free.
        """
        num_new_blocks = -(-num_tokens // self.block_size) - len(block_ids)
        if num_new_blocks <= 0:
            return block_ids
        if num_new_blocks + num_spare_blocks > self._pool.num_free_blocks:
            return None
        return block_ids + self._pool.allocate(num_new_blocks)

    def share(self, block_ids: tuple[int, ...], num_tables: int) -> None:
        """Let so many more tables hold the same blocks. Before one of them writes, see `make_last_private`."""
        self._pool.share(block_ids, num_tables)

    def make_last_private(self, block_ids: tuple[int, ...]) -> tuple[int, ...] | None:
        """Let a table alone hold its last block, so that free slots in it can be written (copy on write).

        Returns the table itself if it already does; else one that ends in a new block, into which the caller has the
        old one copied; None, with nothing changed, if there is no free block.
        """
        if not self._pool.is_shared(block_ids[-1]):
            return block_ids
        if not self._pool.num_free_blocks:
            return None
        self._pool.free(block_ids[-1:])
        return block_ids[:-1] + self._pool.allocate(1)

    def free(self, block_ids: tuple[int, ...]) -> None:
        """Give a block table back. The last block becomes free first, so the front of a prompt stays intact longest."""
        self._pool.free(reversed(block_ids))

    def check_integrity(self, block_tables: Iterable[tuple[int, ...]]) -> None:
        """Assert that these tables, all that are held, and the pool agree: free + used = total, and every ref count."""
        num_holders: Counter[int] = Counter()
        for block_ids in block_tables:
            assert len(set(block_ids)) == len(block_ids), f"a block is twice in the block table {block_ids}"
            num_holders.update(block_ids)
        self._pool.check_integrity(num_holders)
