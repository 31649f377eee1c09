"""Block tables: KV slots for tokens, in whole blocks out of the pool.

Called by the scheduler only. Knows tokens as numbers, and no tensors. A block table is a tuple of block ids: its i-th
block holds the KV of the tokens at positions [i * block_size, (i + 1) * block_size). Paged KV as in Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).

Who may write a block: one that was allocated belongs to one table, which writes its slots in order. Once full and
computed it may be named (`cache`) and then be in further tables, which only read it. A partly filled block is in
several tables only after a fork (`share`), and is copied before any of them writes (`make_last_private`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from octavo_engine.kvcache.pool import BlockPool
from octavo_engine.kvcache.prefix import HASH_BYTES, PrefixIndex, hash_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class KVCacheManager:
    """Allocates and frees the block tables of requests. The tables themselves are kept by whoever asked for them."""

    def __init__(self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size  # KV slots in a block
        self.num_blocks = num_blocks
        self._enable_prefix_caching = enable_prefix_caching
        self._index = PrefixIndex()
        self._pool = BlockPool(num_blocks, self._index)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that are in a block table; times block_size, the allocated slots."""
        return self.num_blocks - self._pool.num_free_blocks

    def begin(
        self,
        token_ids: Sequence[int],
        hashes: list[bytes],
        *,
        owner: bytes,
        num_spare_blocks: int,
        computes_all: bool = False,
        adapter: int = 0,
    ) -> tuple[tuple[int, ...], int] | None:
        """Make a block table for a sequence, of cached blocks as far as there are any.

        At least the last token is left to be computed, so that there are logits after it.

        Args:
            token_ids: all tokens known, at least one.
            hashes: the names of the sequence's first blocks, as far as known; extended here.
            owner: whose private blocks may be used besides everybody's; see `cache`.
            num_spare_blocks: blocks that have to stay free.
            computes_all: use no cached blocks, as the logits of all tokens are wanted.
            adapter: that computes the sequence; 0: none.

        Returns:
            The table and the number of tokens whose KV is in it; None, with no block taken, if it does not fit.
        """
        cached = () if computes_all else self._find_cached(token_ids, hashes, owner, adapter)
        num_new_blocks = -(-len(token_ids) // self.block_size) - len(cached)
        num_taken_blocks = num_new_blocks + sum(map(self._pool.is_free, cached))
        if num_taken_blocks + num_spare_blocks > self._pool.num_free_blocks:
            return None
        self._pool.share(cached)
        return cached + self._pool.allocate(num_new_blocks), len(cached) * self.block_size

    def extend(
        self, block_ids: tuple[int, ...], num_tokens: int, *, num_spare_blocks: int = 0
    ) -> tuple[int, ...] | None:
        """Extend a block table, unless it is long enough, until it has slots for `num_tokens` tokens.

        Returns the table; None, with nothing changed, if not so many blocks besides the spare ones are free.
        """
        num_new_blocks = -(-num_tokens // self.block_size) - len(block_ids)
        if num_new_blocks > max(0, self._pool.num_free_blocks - num_spare_blocks):
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

    def cache(
        self,
        block_ids: tuple[int, ...],
        token_ids: Sequence[int],
        hashes: list[bytes],
        places: range,
        *,
        owner: bytes = b"",
        adapter: int = 0,
    ) -> None:
        """Let the blocks in these places of a table, full and computed, be found by sequences that begin alike.

        `hashes` and `adapter` are as in `begin`. With `owner`, only who names it finds those that nobody finds yet.
        """
        if self._enable_prefix_caching:
            hash_blocks(hashes, token_ids, self.block_size, places.stop, adapter)
            for place in places:
                if not owner or block_ids[place] not in self._index:
                    self._index.add(hashes[place] + owner, block_ids[place])

    def forget(self, block_ids: tuple[int, ...]) -> None:
        """Let nobody else find the blocks of a table any more."""
        for block_id in block_ids:
            self._index.discard(block_id)

    def free(self, block_ids: tuple[int, ...]) -> None:
        """Give a block table back. The last block becomes free first, so the front of a prompt stays intact longest."""
        self._pool.free(reversed(block_ids))

    def check_integrity(self, sequences: Iterable[tuple[tuple[int, ...], Sequence[int], int]]) -> None:
        """Assert that the pool, the prefix cache and these sequences, all that hold blocks, agree.

        Free + used = total, every ref count, and every name is that of the tokens and the adapter. `sequences`: block
        table, tokens, adapter.
        """
        num_holders: Counter[int] = Counter()
        for block_ids, token_ids, adapter in sequences:
            assert len(set(block_ids)) == len(block_ids), f"a block is twice in the block table {block_ids}"
            num_holders.update(block_ids)
            hashes: list[bytes] = []
            num_full_blocks = min(len(block_ids), len(token_ids) // self.block_size)
            hash_blocks(hashes, token_ids, self.block_size, num_full_blocks, adapter)
            for place, block_id in enumerate(block_ids):
                name = self._index.name_of(block_id)
                assert name is None or name[:HASH_BYTES] in hashes[place : place + 1], (
                    f"block {block_id} is cached for other tokens"
                )
        self._pool.check_integrity(num_holders)
        self._index.check_integrity()

    def _find_cached(
        self, token_ids: Sequence[int], hashes: list[bytes], owner: bytes, adapter: int
    ) -> tuple[int, ...]:
        """The cached blocks that a sequence begins with."""
        block_ids: list[int] = []
        if self._enable_prefix_caching:
            for num_blocks in range(1, (len(token_ids) - 1) // self.block_size + 1):
                hash_blocks(hashes, token_ids, self.block_size, num_blocks, adapter)
                block_id = self._index.find(hashes[num_blocks - 1])
                if block_id is None:
                    block_id = self._index.find(hashes[num_blocks - 1] + owner)
                if block_id is None:
                    break
                block_ids.append(block_id)
        return tuple(block_ids)
