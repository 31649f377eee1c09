"""Paged attention by Triton kernels against dense attention; in Triton's interpreter, or on a GPU (see conftest.py)."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.engine.attention.conftest import Sequences
from tests.engine.kernels.conftest import DEVICE

from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape
from octavo_engine.attention.triton import TritonAttention
from octavo_engine.errors import ModelUnsupported
from octavo_engine.kernels.cache import store_kv_twin

sequences_of = functools.partial(Sequences, device=DEVICE)


def cache(*, num_blocks: int = 24, block_size: int = 16, num_kv_heads: int = 1, head_dim: int = 64) -> CacheShape:
    return CacheShape(
        num_layers=2, num_blocks=num_blocks, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim
    )


@pytest.mark.parametrize(
    ("dtype", "block_size", "num_heads", "num_kv_heads", "head_dim"),
    [
        (torch.bfloat16, 16, 9, 3, 64),
        (torch.float16, 32, 8, 2, 80),
        (torch.bfloat16, 16, 32, 1, 96),  # more query heads for one KV head than a small tile has rows
        (torch.float16, 16, 4, 4, 128),
        (torch.bfloat16, 32, 2, 1, 256),
    ],
    ids=str,
)
def test_ragged_prefill_and_decode_in_one_step_equal_dense_attention(
    dtype: torch.dtype, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    shape = cache(block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    sequences = sequences_of(TritonAttention, shape, num_heads=num_heads, dtype=dtype, lengths=[1, 7, 33, 40])
    sequences.step({3: 20, 1: 6})  # prefills
    sequences.step({0: 1, 1: 1, 2: 32, 3: 19})  # a prompt of one token, a decode, a prefill, a continued prefill
    sequences.step({3: 1, 2: 1})


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_windows_soft_caps_and_scales_equal_dense_attention(softcap: float | None, window: int) -> None:
    rules = AttentionRules(scale=0.4, windows=(window, None), softcap=softcap)
    sequences = sequences_of(TritonAttention, cache(), num_heads=3, dtype=torch.float16, lengths=[3, 40], rules=rules)
    sequences.step({1: 21})
    sequences.step({0: 1, 1: 18})
    sequences.step({0: 1, 1: 1})


def test_long_contexts_that_are_cut_into_parts_equal_dense_attention() -> None:
    sequences = sequences_of(
        TritonAttention, cache(num_blocks=80), num_heads=4, dtype=torch.float16, lengths=[700, 520]
    )
    sequences.computed = [699, 0]
    backend = sequences.backend
    assert isinstance(backend, TritonAttention)
    slots = torch.tensor(sequences.tables[0]).repeat_interleave(16)[:700] * 16 + torch.arange(700) % 16
    for layer in range(2):  # the prompt of the first, without attention to it
        caches = (backend._keys[layer], backend._values[layer])
        store_kv_twin(sequences.k[layer][0].to(DEVICE), sequences.v[layer][0].to(DEVICE), *caches, slots.to(DEVICE))
    sequences.step({0: 1, 1: 3})
    assert [tiles.num_parts for tiles in backend._laid_out(4).tiles] == [2]


def test_a_cache_in_e4m3_is_within_its_own_rounding() -> None:
    make = functools.partial(TritonAttention, cache_dtype=torch.float8_e4m3fn)
    sequences = sequences_of(make, cache(), num_heads=2, dtype=torch.bfloat16, lengths=[40, 9], tolerance=0.13)
    sequences.step({0: 30, 1: 8})
    sequences.step({0: 1, 1: 1})


def test_a_copied_block_is_the_same_and_then_a_block_of_its_own() -> None:
    sequences = sequences_of(TritonAttention, cache(), num_heads=2, dtype=torch.float16, lengths=[20, 19])
    for rows in (*sequences.k, *sequences.v):
        rows[1][:18] = rows[0][:18]  # the second forks off the first
    sequences.step({0: 18})
    sequences.computed[1] = 18
    sequences.backend.copy_blocks(tuple(zip(sequences.tables[0], sequences.tables[1], strict=True)))
    sequences.step({0: 1, 1: 1})  # compares with dense attention
    sequences.step({0: 1})


def test_what_a_block_held_before_does_not_reach_its_next_owner() -> None:
    sequences = sequences_of(TritonAttention, cache(num_blocks=4), num_heads=1, dtype=torch.float16, lengths=[18, 3])
    backend = sequences.backend
    slots, table = torch.arange(64, device=DEVICE), torch.arange(4, device=DEVICE)[None]
    backend.begin_step(AttentionMetadata(slot_mapping=slots, block_tables=table, query_lens=(64,), context_lens=(64,)))
    poison = torch.full((64, 1, 64), float("nan"), dtype=torch.float16, device=DEVICE)
    for layer in range(2):
        backend.store(layer, poison, poison)

    sequences.step({0: 17, 1: 2})  # compares with dense attention: NaN would show
    sequences.step({0: 1, 1: 1})


@pytest.mark.parametrize(("shape", "what"), [(cache(head_dim=72), "heads of 72"), (cache(block_size=8), "blocks of 8")])
def test_a_shape_without_a_kernel_is_refused_by_name(shape: CacheShape, what: str) -> None:
    rules = AttentionRules(scale=1.0, windows=(None, None))
    with pytest.raises(ModelUnsupported, match=what):
        TritonAttention(shape, rules, dtype=torch.float16, device=DEVICE)
