"""The attention kernel equals its twin, which is float64 throughout.

Bounds: what is written is rounded once, and the weights once before they multiply the values: two units in the last
place of the largest number there may be. A cache in e4m3 is decoded exactly, so its bound is the same.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.engine.kernels.conftest import DEVICE
from tests.engine.kernels.interpreted.conftest import assert_within, launched, normal

from octavo_engine.kernels import attention, cache
from octavo_engine.kernels.launch import TARGETS, Target, target_of

BOUND = 4.0  # units in the last place: values are about 1, some 2 or 3

# (query, context) lengths of the requests of a step
DECODES = [(1, 1), (1, 16), (1, 17), (1, 90)]
MIXED = [(1, 5), (9, 9), (1, 70), (20, 40)]


def compare(
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    is_fp8: bool = False,
    parts: int = 1,
) -> None:
    """Attention of some requests over a cache with shuffled blocks, and NaN wherever no request wrote."""
    num_blocks = [-(-context // block_size) for _, context in lengths]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(3))
    tables = torch.zeros((len(lengths), max(num_blocks)), dtype=torch.int64)
    empty = torch.full((len(order), block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    keys, values = (cache.encoded(empty.float()) if is_fp8 else empty.clone() for _ in range(2))
    for request, (_, context) in enumerate(lengths):
        first = sum(num_blocks[:request])
        tables[request, : num_blocks[request]] = order[first : first + num_blocks[request]]
        slots = (
            tables[request].repeat_interleave(block_size)[:context] * block_size + torch.arange(context) % block_size
        )
        k, v = normal(2, context, num_kv_heads, head_dim, dtype=dtype, seed=request)
        cache.store_kv_twin(k, v, keys, values, slots)
    starts = list(itertools.accumulate((query for query, _ in lengths), initial=0))
    requests = torch.tensor([(start, *each) for start, each in zip(starts, lengths, strict=False)], dtype=torch.int32)
    q = normal(starts[-1], num_heads + 2, head_dim, dtype=dtype, seed=9)[:, :num_heads]
    scores = attention.Scores(
        head_dim**-0.5, softcap, key_scale=0.5 if is_fp8 else 1.0, value_scale=2.0 if is_fp8 else 1.0
    )
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    group, query_lens = num_heads // num_kv_heads, [query for query, _ in lengths]
    for rows, tall in ((attention.SMALL_ROWS, False), (attention.tall_rows(target_of(DEVICE), head_dim), True)):
        places = torch.tensor(attention.tiles_of(query_lens, group=group, rows=rows, tall=tall), dtype=torch.int32)
        if len(places):
            tiles = attention.Tiles(rows, places, 1 if tall else parts)
            launched(attention.attend)(out, q, keys, values, tables, requests, tiles, scores, window=window)
    expected = attention.attend_twin(q, keys, values, tables, requests, scores, window=window)
    assert_within(out, expected, BOUND)


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_head_sizes(dtype: torch.dtype, head_dim: int) -> None:
    compare(MIXED, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size", "is_fp8"), [(9, 3, 32, True), (2, 2, 16, True), (20, 1, 32, False)]
)
def test_groups_and_blocks(num_heads: int, num_kv_heads: int, block_size: int, *, is_fp8: bool) -> None:
    compare(
        MIXED,
        dtype=torch.bfloat16,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        is_fp8=is_fp8,
    )


@pytest.mark.parametrize(
    ("lengths", "window", "softcap"),
    [(DECODES, 1, None), (MIXED, 1, 1.5), (DECODES, 33, 1.5), (MIXED, 16, None)],
    ids=str,
)
def test_windows_and_soft_caps(lengths: list[tuple[int, int]], window: int, softcap: float | None) -> None:
    compare(lengths, dtype=torch.float16, window=window, softcap=softcap)


@pytest.mark.parametrize(
    ("parts", "window", "is_fp8"),
    [(2, None, False), (3, 20, False), (7, 20, True)],  # more parts than tiles of keys
)
def test_tiles_cut_into_parts(parts: int, window: int | None, *, is_fp8: bool) -> None:
    lengths = [(1, 300), (2, 150), (1, 3)]
    compare(lengths, dtype=torch.float16, num_kv_heads=2, parts=parts, window=window, is_fp8=is_fp8)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
@pytest.mark.parametrize("block_size", attention.BLOCK_SIZES)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("parts", [1, 3])
def test_everything_together(
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    softcap: float | None,
    window: int | None,
    parts: int,
    *,
    is_fp8: bool,
) -> None:
    compare(
        [*MIXED, (1, 200)],
        dtype=dtype,
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        softcap=softcap,
        window=window,
        parts=parts,
        is_fp8=is_fp8,
    )


def test_each_row_of_a_request_is_in_one_tile() -> None:
    query_lens = [1, 100, 2, 6, 5]
    seen: list[tuple[int, int]] = []
    for rows, tall in ((16, False), (64, True)):
        tiles = attention.tiles_of(query_lens, group=3, rows=rows, tall=tall)
        seen += [
            (request, row)
            for request, first in tiles
            for row in range(first, min(first + rows, 3 * query_lens[request]))
        ]
    assert sorted(seen) == [(request, row) for request, length in enumerate(query_lens) for row in range(3 * length)]


@pytest.mark.parametrize(
    ("num_programs", "context", "parts"),
    [(8, 8192, 16), (8, 100, 1), (8, 1000, 3), (64, 8192, 4), (264, 8192, 1), (10_000, 100_000, 1)],
)
def test_few_tiles_are_cut_into_parts_that_keep_a_gpu_busy(num_programs: int, context: int, parts: int) -> None:
    assert attention.parts_for(num_programs, context, 132) == parts


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: str(target.capability))
def test_tall_tiles_are_as_tall_as_registers_allow(target: Target) -> None:
    assert attention.tall_rows(target, 256) == 64
    assert attention.tall_rows(target, 128) == (128 if target.capability >= 90 else 64)
