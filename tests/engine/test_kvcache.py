import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.kvcache.manager import KVCacheManager
from octavo_engine.kvcache.pool import BlockPool


def allocate(kv: KVCacheManager, num_tokens: int) -> tuple[int, ...]:
    block_ids = kv.allocate((), num_tokens)
    assert block_ids is not None
    return block_ids


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tokens_get_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    assert len(allocate(kv, num_tokens)) == num_blocks
    assert kv.num_used_blocks == num_blocks


def test_a_table_with_room_left_stays_as_it_is() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    block_ids = allocate(kv, 5)
    assert kv.allocate(block_ids, 8) is block_ids
    assert kv.num_used_blocks == 2


def test_a_full_table_grows_by_blocks_at_its_end() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    block_ids = allocate(kv, 8)
    longer = kv.allocate(block_ids, 9)
    assert longer is not None
    assert longer[:2] == block_ids
    assert len(set(longer)) == 3
    kv.check_integrity([longer])


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    block_ids = allocate(kv, 4)
    assert kv.allocate((), 9) is None
    assert kv.allocate(block_ids, 13) is None
    kv.check_integrity([block_ids])


def test_spare_blocks_stay_free() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    assert kv.allocate((), 8, num_spare_blocks=2) is None
    assert kv.allocate((), 8, num_spare_blocks=1) is not None


def test_the_blocks_freed_the_longest_ago_are_taken_first_and_a_tables_front_last() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=1)
    first, second = allocate(kv, 2), allocate(kv, 2)
    kv.free(second)
    kv.free(first)
    assert allocate(kv, 4) == (second[1], second[0], first[1], first[0])


def test_an_unused_block_in_a_table_breaks_integrity() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=4)
    with pytest.raises(AssertionError, match=r"both free and in a block table: \[1\]"):
        kv.check_integrity([(1,)])


def test_a_leaked_block_breaks_integrity() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=4)
    allocate(kv, 4)
    with pytest.raises(AssertionError, match=r"1 free \+ 0 used blocks are not the pool's 2"):
        kv.check_integrity([])


def test_a_block_in_more_tables_than_it_counts_breaks_integrity() -> None:
    kv = KVCacheManager(num_blocks=2, block_size=4)
    block_ids = allocate(kv, 4)
    with pytest.raises(AssertionError, match="counts 1 holders, 2 block tables hold it"):
        kv.check_integrity([block_ids, block_ids])


def test_a_block_freed_twice_breaks_integrity() -> None:
    pool = BlockPool(2)
    block_ids = pool.allocate(1)
    pool.free(block_ids)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match="counts -1 holders"):
        pool.check_integrity({})


@given(data=st.data(), num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
def test_no_sequence_of_allocations_loses_or_shares_a_block(
    data: st.DataObject, num_blocks: int, block_size: int
) -> None:
    kv = KVCacheManager(num_blocks=num_blocks, block_size=block_size)
    tables: list[tuple[int, ...]] = []
    for action in data.draw(st.lists(st.sampled_from(["allocate", "extend", "free"]), max_size=30)):
        old = () if action == "allocate" or not tables else tables.pop(data.draw(st.integers(0, len(tables) - 1)))
        if action == "free":
            kv.free(old)
        else:
            num_tokens = data.draw(st.integers(1, num_blocks * block_size))
            num_new_blocks = max(0, len(range(0, num_tokens, block_size)) - len(old))
            num_free_blocks = num_blocks - kv.num_used_blocks
            new = kv.allocate(old, num_tokens)
            assert (new is not None) == (num_new_blocks <= num_free_blocks)
            assert new is None or len(new) == len(old) + num_new_blocks
            tables.append(old if new is None else new)
        kv.check_integrity(tables)
        assert kv.num_used_blocks == sum(map(len, tables))
