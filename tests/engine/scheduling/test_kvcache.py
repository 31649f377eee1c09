from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.kvcache.manager import KVCacheManager
from octavo_engine.kvcache.pool import BlockPool
from octavo_engine.kvcache.prefix import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    Begun = tuple[tuple[int, ...], int] | None


def manager(num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching)


def begin(kv: KVCacheManager, tokens: Sequence[int], owner: bytes = b"", num_spare_blocks: int = 0) -> Begun:
    """The block table and the number of tokens found, or None."""
    return kv.begin(tokens, [], owner=owner, num_spare_blocks=num_spare_blocks)


def allocate(kv: KVCacheManager, num_tokens: int) -> tuple[int, ...]:
    block_ids = kv.extend((), num_tokens)
    assert block_ids is not None
    return block_ids


def compute(kv: KVCacheManager, tokens: Sequence[int], owner: bytes = b"") -> tuple[int, ...]:
    """Compute a sequence, cache its full blocks and end it."""
    begun = begin(kv, tokens)
    assert begun is not None
    kv.cache(begun[0], tokens, [], range(len(tokens) // kv.block_size), owner=owner)
    kv.check_integrity([(begun[0], tokens, 0)])
    kv.free(begun[0])
    return begun[0]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tokens_get_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    kv = manager(3, 4)
    assert len(allocate(kv, num_tokens)) == num_blocks
    assert kv.num_used_blocks == num_blocks


def test_who_has_another_adapter_finds_no_block_of_the_same_tokens() -> None:
    kv = manager(20, 2)
    for adapter in (0, 1, 2, 256):
        begun = kv.begin(range(7), [], owner=b"", num_spare_blocks=0, adapter=adapter)
        assert begun is not None
        assert begun[1] == 0
        kv.cache(begun[0], range(7), [], range(3), adapter=adapter)
        kv.check_integrity([(begun[0], range(7), adapter)])
        with pytest.raises(AssertionError, match="cached for other tokens"):
            kv.check_integrity([(begun[0], range(7), adapter + 1)])
        kv.free(begun[0])
    for adapter, found in ((0, 6), (1, 6), (2, 6), (256, 6), (3, 0)):
        begun = kv.begin(range(7), [], owner=b"", num_spare_blocks=0, adapter=adapter)
        assert begun is not None
        assert begun[1] == found
        kv.free(begun[0])


def test_a_table_with_room_left_stays_as_it_is() -> None:
    kv = manager(3, 4)
    block_ids = allocate(kv, 5)
    assert kv.extend(block_ids, 8) is block_ids
    assert kv.num_used_blocks == 2


def test_a_full_table_grows_by_blocks_at_its_end() -> None:
    kv = manager(3, 4)
    block_ids = allocate(kv, 8)
    longer = kv.extend(block_ids, 9)
    assert longer is not None
    assert longer[:2] == block_ids
    assert len(set(longer)) == 3
    kv.check_integrity([(longer, range(9), 0)])


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    kv = manager(3, 4)
    block_ids = allocate(kv, 4)
    assert kv.extend((), 13) is None
    assert kv.extend(block_ids, 13) is None
    kv.check_integrity([(block_ids, range(4), 0)])


def test_spare_blocks_stay_free() -> None:
    kv = manager(3, 4)
    assert begin(kv, range(8), num_spare_blocks=2) is None
    assert begin(kv, range(8), num_spare_blocks=1) is not None


def test_blocks_that_nobody_can_find_are_taken_first_then_the_cached_ones_the_longest_free_first() -> None:
    kv = manager(5, 1)
    first = compute(kv, [1, 2])
    second = compute(kv, [3])
    unnamed = allocate(kv, 1)
    kv.free(unnamed)
    assert allocate(kv, 5) == (*unnamed, 4, first[1], first[0], second[0])


def test_a_sequence_that_begins_like_another_finds_its_full_blocks() -> None:
    kv = manager(8, 4)
    block_ids = compute(kv, range(10))
    for tokens, num_found in ((range(10), 8), (range(9), 8), (range(8), 4), (range(4), 0), ([*range(7), 99, 8], 4)):
        begun = begin(kv, tokens)
        assert begun is not None
        assert begun[1] == num_found, "at least the last token is left to compute"
        assert begun[0][: num_found // 4] == block_ids[: num_found // 4]
        kv.check_integrity([(begun[0], tokens, 0)])
        kv.free(begun[0])


def test_a_block_is_found_only_behind_the_tokens_that_it_was_computed_behind() -> None:
    kv = manager(8, 2)
    compute(kv, [1, 2, 3, 4])
    assert begin(kv, [9, 9, 3, 4, 5]) == ((2, 3, 4), 0)


def test_a_found_block_is_shared_while_both_run_and_stays_until_both_have_ended() -> None:
    kv = manager(5, 2)
    compute(kv, [1, 2, 3])
    one, other = begin(kv, [1, 2, 3]), begin(kv, [1, 2, 5])
    assert one is not None
    assert other is not None
    assert one[0][0] == other[0][0]
    assert kv.num_used_blocks == 3
    kv.free(one[0])
    kv.check_integrity([(other[0], [1, 2, 5], 0)])
    assert begin(kv, range(100, 108)) is None, "one block is still held"
    kv.free(other[0])
    assert begin(kv, range(100, 110)) is not None


def test_what_is_taken_is_no_longer_found() -> None:
    kv = manager(2, 2)
    compute(kv, [1, 2, 3, 4])
    kv.free(allocate(kv, 1))
    assert begin(kv, [1, 2, 3, 4]) == ((0, 1), 2), "the end of the sequence went first"
    kv.free((0, 1))
    kv.free(allocate(kv, 4))
    assert begin(kv, [1, 2, 3, 4]) is not None
    assert kv.num_used_blocks == 2


def test_found_blocks_that_are_free_count_as_taken() -> None:
    kv = manager(2, 2)
    compute(kv, [1, 2, 3])
    assert begin(kv, [1, 2, 3], num_spare_blocks=1) is None
    kv.check_integrity([])
    assert begin(kv, [1, 2, 3]) is not None


def test_private_blocks_are_found_by_their_owner_until_they_are_everybodys() -> None:
    kv = manager(8, 2)
    block_ids = compute(kv, [1, 2, 3, 4], owner=b"me")
    assert kv._find_cached([1, 2, 3, 4, 5], [], b"you", 0) == ()
    assert kv._find_cached([1, 2, 3, 4, 5], [], b"me", 0) == block_ids
    kv.share(block_ids, 1)
    kv.cache(block_ids, [1, 2, 3, 4], [], range(2))
    kv.cache(block_ids, [1, 2, 3, 4], [], range(2), owner=b"me")
    kv.check_integrity([(block_ids, [1, 2, 3, 4], 0)])
    assert kv._find_cached([1, 2, 3, 4, 5], [], b"you", 0) == block_ids


def test_forgotten_blocks_are_not_found() -> None:
    kv = manager(8, 2)
    block_ids = compute(kv, [1, 2, 3, 4])
    kv.share(block_ids, 1)
    kv.forget(block_ids)
    kv.free(block_ids)
    kv.check_integrity([])
    assert kv._find_cached([1, 2, 3, 4, 5], [], b"", 0) == ()


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = manager(8, 2, enable_prefix_caching=False)
    compute(kv, [1, 2, 3, 4])
    assert kv._find_cached([1, 2, 3, 4, 5], [], b"", 0) == ()


def test_a_shared_last_block_is_exchanged_before_it_is_written() -> None:
    kv = manager(3, 4)
    block_ids = allocate(kv, 6)
    kv.share(block_ids, 1)
    private = kv.make_last_private(block_ids)
    assert private == (0, 2)
    assert kv.make_last_private(block_ids) is block_ids, "nobody else holds it any more"
    kv.check_integrity([(block_ids, range(6), 0), (private, range(6), 0)])
    kv.share(private, 1)
    assert kv.make_last_private(private) is None


def test_a_block_cached_for_other_tokens_breaks_integrity() -> None:
    kv = manager(8, 2)
    block_ids = allocate(kv, 4)
    kv.cache(block_ids, [1, 2, 3, 4], [], range(2))
    with pytest.raises(AssertionError, match="block 1 is cached for other tokens"):
        kv.check_integrity([(block_ids, [1, 2, 3, 5], 0)])


def test_an_unused_block_in_a_table_breaks_integrity() -> None:
    kv = manager(2, 4)
    with pytest.raises(AssertionError, match=r"both free and in a block table: \[1\]"):
        kv.check_integrity([((1,), range(4), 0)])


def test_a_leaked_block_breaks_integrity() -> None:
    kv = manager(2, 4)
    allocate(kv, 4)
    with pytest.raises(AssertionError, match=r"1 free \+ 0 used blocks are not the pool's 2"):
        kv.check_integrity([])


def test_a_block_in_more_tables_than_it_counts_breaks_integrity() -> None:
    kv = manager(2, 4)
    block_ids = allocate(kv, 4)
    with pytest.raises(AssertionError, match="counts 1 holders, 2 block tables hold it"):
        kv.check_integrity([(block_ids, range(4), 0), (block_ids, range(4), 0)])


def test_a_block_freed_twice_breaks_integrity() -> None:
    pool = BlockPool(2, PrefixIndex())
    block_ids = pool.allocate(1)
    pool.free(block_ids)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match="counts -1 holders"):
        pool.check_integrity({})


@given(data=st.data(), num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
def test_no_sequence_of_allocations_loses_or_shares_a_block(
    data: st.DataObject, num_blocks: int, block_size: int
) -> None:
    kv = manager(num_blocks, block_size)
    tables: list[tuple[int, ...]] = []
    for action in data.draw(st.lists(st.sampled_from(["allocate", "extend", "free"]), max_size=30)):
        old = () if action == "allocate" or not tables else tables.pop(data.draw(st.integers(0, len(tables) - 1)))
        if action == "free":
            kv.free(old)
        else:
            num_tokens = data.draw(st.integers(1, num_blocks * block_size))
            num_new_blocks = max(0, len(range(0, num_tokens, block_size)) - len(old))
            num_free_blocks = num_blocks - kv.num_used_blocks
            new = kv.extend(old, num_tokens)
            assert (new is not None) == (num_new_blocks <= num_free_blocks)
            assert new is None or len(new) == len(old) + num_new_blocks
            tables.append(old if new is None else new)
        kv.check_integrity([(table, (), 0) for table in tables])
        assert kv.num_used_blocks == sum(map(len, tables))
