"""Paged attention in torch against dense attention computed token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.attention.conftest import TOLERANCE, Sequences

from octavo_engine.attention import reference
from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape
from octavo_engine.attention.reference import ReferenceAttention


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_ragged_prefill_and_decode_in_one_step_equal_dense_attention(
    dtype: torch.dtype, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    lengths = [1, 7, 16, 17, 40]
    shape = CacheShape(
        num_layers=2, num_blocks=100, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    sequences = Sequences(ReferenceAttention, shape, num_heads=num_heads, dtype=dtype, lengths=lengths)
    sequences.step({4: 20, 1: 6})  # prefills
    sequences.step({0: 1, 1: 1, 2: 15, 4: 19})  # a prompt of one token, a decode, a prefill, a continued prefill
    sequences.step({4: 1, 2: 1, 3: 17})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_windows_soft_caps_and_scales_equal_dense_attention(
    dtype: torch.dtype, softcap: float | None, window: int
) -> None:
    shape = CacheShape(num_layers=2, num_blocks=40, block_size=4, num_kv_heads=2, head_dim=16)
    rules = AttentionRules(scale=0.4, windows=(window, None), softcap=softcap)
    sequences = Sequences(ReferenceAttention, shape, num_heads=6, dtype=dtype, lengths=[3, 17, 40], rules=rules)
    sequences.step({2: 20, 1: 6})
    sequences.step({0: 1, 1: 10, 2: 19})
    sequences.step({0: 1, 1: 1, 2: 1})


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_order_of_pieces_equals_dense_attention(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    block_size = data.draw(st.sampled_from([1, 3, 8]))
    shape = CacheShape(num_layers=1, num_blocks=150, block_size=block_size, num_kv_heads=2, head_dim=8)
    window = data.draw(st.none() | st.integers(1, 30))
    softcap = data.draw(st.none() | st.just(1.5))
    rules = AttentionRules(scale=8**-0.5, windows=(window,), softcap=softcap)
    sequences = Sequences(ReferenceAttention, shape, num_heads=4, dtype=torch.float32, lengths=lengths, rules=rules)
    while any(computed < length for computed, length in zip(sequences.computed, lengths, strict=True)):
        unfinished = [index for index, length in enumerate(lengths) if sequences.computed[index] < length]
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        sequences.step(
            {index: data.draw(st.integers(1, lengths[index] - sequences.computed[index])) for index in chosen}
        )


def test_decodes_that_gather_more_than_the_bound_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_GATHER_BYTES", 8 * 8 * 8 * 5 * 2)  # two requests of 5 blocks at a time
    shape = CacheShape(num_layers=1, num_blocks=64, block_size=8, num_kv_heads=1, head_dim=8)
    sequences = Sequences(ReferenceAttention, shape, num_heads=2, dtype=torch.float32, lengths=[40, 39, 38, 37, 36])
    sequences.step(dict.fromkeys(range(5), 35))
    sequences.step(dict.fromkeys(range(5), 1))
    assert isinstance(sequences.backend, ReferenceAttention)
    assert len(sequences.backend._groups) == 3


def test_a_copied_block_is_the_same_and_then_a_block_of_its_own() -> None:
    shape = CacheShape(num_layers=2, num_blocks=8, block_size=4, num_kv_heads=1, head_dim=8)
    sequences = Sequences(ReferenceAttention, shape, num_heads=2, dtype=torch.float32, lengths=[9, 8])
    for rows in (*sequences.k, *sequences.v):
        rows[1][:6] = rows[0][:6]  # the second forks off the first
    sequences.step({0: 6})
    sequences.computed[1] = 6
    sequences.backend.copy_blocks(tuple(zip(sequences.tables[0][:2], sequences.tables[1], strict=True)))
    sequences.step({0: 2, 1: 2})  # compares with dense attention
    sequences.step({0: 1})


def test_what_a_block_held_before_does_not_reach_its_next_owner() -> None:
    shape = CacheShape(num_layers=1, num_blocks=4, block_size=4, num_kv_heads=1, head_dim=8)
    sequences = Sequences(ReferenceAttention, shape, num_heads=1, dtype=torch.float32, lengths=[6, 3])
    backend = sequences.backend
    everything = AttentionMetadata(
        slot_mapping=torch.arange(16), block_tables=torch.arange(4)[None], query_lens=(16,), context_lens=(16,)
    )
    backend.begin_step(everything)
    poison = torch.full((16, 1, 8), float("nan"))
    backend.store(0, poison, poison)

    sequences.step({0: 5, 1: 2})  # compares with dense attention: NaN would show
    sequences.step({0: 1, 1: 1})
