"""The prefix cache's index: which block holds the KV of which tokens.

Called by kvcache/manager.py and pool.py only. Knows tokens as numbers and blocks as ids, nothing of requests.

KV depends on all tokens before it, so a block is named by a hash over the name of the block before it and its own
tokens: one look-up by that name finds a block that holds these tokens in this place after those before them. The hash
is a cryptographic one of 512 bits, so that nobody can make two prompts share a name and read another's KV.

KV also depends on the LoRA adapter that it was computed with: the adapter's number salts every hash of the chain, so
that requests with different adapters never share a block. A number is never used again: what one adapter left in the
cache is not found by another that is loaded under its name.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import pack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HASH_BYTES = 64
_SALT_BYTES = 16


def hash_blocks(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, num_blocks: int, adapter: int = 0
) -> None:
    """Extend `hashes`, the names of the first blocks of a sequence, until there are `num_blocks`, all of them full.

    `adapter` is that of all of them; 0: the model by itself.
    """
    salt = adapter.to_bytes(_SALT_BYTES, "little")
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        parent = hashes[-1] if hashes else b""
        tokens = pack(f"{block_size}q", *token_ids[start : start + block_size])
        hashes.append(blake2b(parent + tokens, salt=salt).digest())


class PrefixIndex:
    """A name for some of the blocks; no two blocks have the same one."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hashes

    def find(self, block_hash: bytes) -> int | None:
        """The block of that name."""
        return self._blocks.get(block_hash)

    def add(self, block_hash: bytes, block_id: int) -> None:
        """Name a block, or name it anew, unless the name is taken: the block that has it keeps it."""
        if block_hash not in self._blocks:
            self.discard(block_id)
            self._blocks[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def discard(self, block_id: int) -> None:
        """Take a block's name away, if it has one."""
        block_hash = self._hashes.pop(block_id, None)
        if block_hash is not None:
            del self._blocks[block_hash]

    def name_of(self, block_id: int) -> bytes | None:
        """The name of a block, if it has one."""
        return self._hashes.get(block_id)

    def check_integrity(self) -> None:
        """Assert that blocks and names are one to one."""
        assert self._blocks == {block_hash: block_id for block_id, block_hash in self._hashes.items()}, (
            "the prefix cache's two tables disagree"
        )
