"""Paged attention over ragged prefills and decodes, in one kernel. Launched by attention/triton.py.

The rows of a request are its (token, query head) pairs that share one KV head, flattened: a tile is some adjacent rows
of one request, whatever the size of the group, so that each key and value is read once for the whole group and no row
of a tile is idle but at the end of a request. Which tiles there are is laid out on the host, once for all layers: a
decode has one tile of few rows, a prefill as many tall ones as it needs.

Where a step has few tiles, each is cut along its keys ("split KV", Dao et al. 2023, flash decoding): the parts write
unnormalised sums, and `_combine` joins them. Softmax is online (Milakov and Gimelshein 2018), in base 2 and float32.

A query at position p sees the slots s with p - window < s <= p, and of its own request only: what lies in the last
block behind the context, or in blocks before the window, is not read, so that a block need not be cleared.

Shapes: T tokens of the step, R requests, N query heads, K KV heads, D head size, B blocks, S slots in a block, M the
width of the block tables, W tiles, P parts that a tile is cut into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels.cache import decoded
from octavo_engine.kernels.launch import Kernel, Target, Variant, pointer, power_of_two
from octavo_engine.kernels.numeric import decode_e4m3, tanh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DTYPES: Final = (torch.float16, torch.bfloat16)
HEAD_DIMS: Final = (64, 80, 96, 128, 256)
BLOCK_SIZES: Final = (16, 32)
NO_WINDOW: Final = 1 << 30  # more than any position, and far from what overflows
SMALL_ROWS: Final = 16  # the least that tensor cores multiply
MAX_PARTS: Final = 16
_LOG2_E: Final = 1.4426950408889634
_TOKENS_A_PART: Final = 256  # fewer are not worth a part


@triton.jit(
    do_not_specialize=["q_stride", "num_heads", "num_kv_heads", "group", "table_width", "window", "num_parts"],
)
def _attend(
    out,  # [T, N, D]
    part_sums,  # float32 [W, K, P, ROWS, D_PADDED]: sums of weighted values
    part_stats,  # float32 [W, K, P, 2, ROWS]: highest scores, and sums of weights
    q,
    key_cache,
    value_cache,
    tables,
    tiles,
    requests,
    score_scale,  # from products to scores in base 2, or to what tanh takes
    softcap,  # from what tanh gives to scores in base 2
    value_scale,
    q_stride,  # counts D numbers
    num_heads,
    num_kv_heads,
    group,
    table_width,
    window,
    num_parts,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """Program (tile, KV head, part)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    request = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    first_token = tl.load(requests + 3 * request)
    query_len = tl.load(requests + 3 * request + 1)
    context_len = tl.load(requests + 3 * request + 2)

    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // group
    heads = kv_head * group + rows % group
    is_row = tokens < query_len
    positions = context_len - query_len + tokens
    dims = tl.arange(0, D_PADDED)
    is_dim = dims < D
    q_rows = ((first_token + tokens).to(tl.int64) * q_stride + heads) * D
    inside = is_row[:, None] & is_dim[None, :]
    queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=inside, other=0.0)

    last_token = tl.minimum((first_row + ROWS - 1) // group, query_len - 1)
    end = context_len - query_len + last_token + 1
    start = tl.maximum(context_len - query_len + first_row // group - window + 1, 0)
    share = tl.cdiv(tl.cdiv(end, SLOTS) - start // SLOTS, num_parts)
    first = start // SLOTS + part * share
    last = tl.minimum(first + share, tl.cdiv(end, SLOTS))

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D_PADDED], tl.float32)
    for step in range(first, last):
        slots = step * SLOTS + tl.arange(0, SLOTS)
        is_slot = slots < end
        blocks = tl.load(tables + request.to(tl.int64) * table_width + slots // S, mask=is_slot, other=0)
        cache_rows = ((blocks * S + slots % S) * num_kv_heads + kv_head) * D
        kv_places = cache_rows[:, None] + dims[None, :]
        kv_inside = is_slot[:, None] & is_dim[None, :]
        if IS_FP8:
            keys = decode_e4m3(tl.load(key_cache + kv_places, mask=kv_inside, other=0)).to(queries.dtype)
        else:
            keys = tl.load(key_cache + kv_places, mask=kv_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * score_scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores)
        is_seen = (slots[None, :] <= positions[:, None]) & (slots[None, :] > positions[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(highest - finite)
        totals = totals * fade + tl.sum(weights, 1)
        highest = higher
        if IS_FP8:
            values = decode_e4m3(tl.load(value_cache + kv_places, mask=kv_inside, other=0)).to(queries.dtype)
        else:
            values = tl.load(value_cache + kv_places, mask=kv_inside, other=0.0)
        sums = tl.dot(weights.to(queries.dtype), values, sums * fade[:, None])

    if num_parts == 1:
        result = sums / totals[:, None] * value_scale
        out_rows = ((first_token + tokens).to(tl.int64) * num_heads + heads) * D
        tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
    else:
        place = (tile * num_kv_heads + kv_head).to(tl.int64) * num_parts + part
        in_tile = tl.arange(0, ROWS)
        tl.store(part_sums + (place * ROWS + in_tile)[:, None] * D_PADDED + dims[None, :], sums)
        tl.store(part_stats + place * 2 * ROWS + in_tile, highest)
        tl.store(part_stats + (place * 2 + 1) * ROWS + in_tile, totals)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads", "group", "num_parts"])
def _combine(
    out,
    part_sums,
    part_stats,
    tiles,
    requests,
    value_scale,
    num_heads,
    num_kv_heads,
    group,
    num_parts,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (tile, KV head): join the parts of a tile."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(tiles + 2 * tile)
    first_token = tl.load(requests + 3 * request)
    query_len = tl.load(requests + 3 * request + 1)
    in_tile = tl.arange(0, ROWS)
    rows = tl.load(tiles + 2 * tile + 1) + in_tile
    tokens = rows // group
    dims = tl.arange(0, D_PADDED)
    first = (tile * num_kv_heads + kv_head).to(tl.int64) * num_parts

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D_PADDED], tl.float32)
    for part in range(num_parts):
        place = first + part
        part_highest = tl.load(part_stats + place * 2 * ROWS + in_tile)
        part_totals = tl.load(part_stats + (place * 2 + 1) * ROWS + in_tile)
        part_values = tl.load(part_sums + (place * ROWS + in_tile)[:, None] * D_PADDED + dims[None, :])
        higher = tl.maximum(highest, part_highest)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fade, part_fade = tl.exp2(highest - finite), tl.exp2(part_highest - finite)
        totals = totals * fade + part_totals * part_fade
        sums = sums * fade[:, None] + part_values * part_fade[:, None]
        highest = higher

    result = sums / totals[:, None] * value_scale
    out_rows = ((first_token + tokens).to(tl.int64) * num_heads + kv_head * group + rows % group) * D
    inside = (tokens < query_len)[:, None] & (dims < D)[None, :]
    tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=inside)


def tall_rows(target: Target, head_dim: int) -> int:
    """The rows of a prefill's tile: what registers hold of sums, and on Hopper two warp groups' worth."""
    return 128 if target.capability >= 90 and head_dim <= 128 else 64


def _attend_variant(
    dtype: torch.dtype, head_dim: int, block_size: int, rows: int, *, has_softcap: bool, is_fp8: bool
) -> Variant:
    padded = power_of_two(head_dim)
    cached = pointer(torch.uint8) if is_fp8 else pointer(dtype)
    pointers = (pointer(dtype), "*fp32", "*fp32", pointer(dtype), cached, cached, "*i64", "*i32", "*i32")
    return Variant(
        types=(*pointers, "fp32", "fp32", "fp32", *("i32",) * 7),
        constants=(
            ("D", head_dim),
            ("D_PADDED", padded),
            ("S", block_size),
            ("ROWS", rows),
            ("SLOTS", 64 if padded <= 128 else 32),
            ("HAS_SOFTCAP", has_softcap),
            ("IS_FP8", is_fp8),
        ),
        num_warps=4 if rows * padded < 64 * 128 else 8,  # with four, sums and addresses of a tall tile are spilled
        num_stages=4 if padded <= 128 else 3,  # one of them is the block ids'
    )


def _attend_variants(target: Target) -> Iterator[Variant]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for block_size in BLOCK_SIZES:
                for rows in (SMALL_ROWS, tall_rows(target, head_dim)):
                    for has_softcap in (False, True):
                        for is_fp8 in (False, True):
                            yield _attend_variant(
                                dtype, head_dim, block_size, rows, has_softcap=has_softcap, is_fp8=is_fp8
                            )


def _combine_variant(dtype: torch.dtype, head_dim: int) -> Variant:
    types = (pointer(dtype), "*fp32", "*fp32", "*i32", "*i32", "fp32", *("i32",) * 4)
    constants = (("D", head_dim), ("D_PADDED", power_of_two(head_dim)), ("ROWS", SMALL_ROWS))
    return Variant(types, constants, num_warps=4)


def _combine_variants(_target: Target) -> Iterator[Variant]:
    return (_combine_variant(dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS)


ATTEND: Final = Kernel(_attend, _attend_variants)
COMBINE: Final = Kernel(_combine, _combine_variants)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one height, and in how many parts each is computed."""

    rows: int
    places: torch.Tensor  # int32 [W, 2]: the request, and the first of its rows
    num_parts: int  # more than 1 only where rows are SMALL_ROWS


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of products before the softmax, and what the numbers of a cache in e4m3 are multiplied by."""

    scale: float
    softcap: float | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0


def tiles_of(query_lens: Sequence[int], *, group: int, rows: int, tall: bool) -> list[tuple[int, int]]:
    """(request, first row) of every tile of the requests that have more (tall) or at most SMALL_ROWS rows."""
    return [
        (request, row)
        for request, query_len in enumerate(query_lens)
        if (query_len * group > SMALL_ROWS) == tall
        for row in range(0, query_len * group, rows)
    ]


def parts_for(num_programs: int, longest_context: int, num_processors: int) -> int:
    """Into how many parts to cut each tile, so that there is work for all of a GPU's multiprocessors twice.

    Args:
        num_programs: tiles times KV heads.
        longest_context: in tokens.
        num_processors: multiprocessors of the GPU.
    """
    wanted = 2 * num_processors // num_programs
    return max(1, min(wanted, longest_context // _TOKENS_A_PART, MAX_PARTS))


def attend(
    out: torch.Tensor,
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    requests: torch.Tensor,
    tiles: Tiles,
    scores: Scores,
    *,
    window: int | None,
) -> None:
    """Compute the rows of some tiles.

    Args:
        out: [T, N, D], contiguous, of the dtype of q; other rows are left as they are.
        q: float16 or bfloat16 [T, N, D], each row contiguous; rows may be parts of longer ones.
        key_cache: [B, S, K, D] of the dtype of q, or uint8 for codes of e4m3; contiguous.
        value_cache: the same.
        tables: int64 [R, M], contiguous: each request's blocks; beyond its own: any value.
        requests: int32 [R, 3]: of each its first token in the step, how many it brings, and its context with these.
        tiles: which.
        scores: the rules.
        window: tokens that a query sees, itself among them; None: all before it.
    """
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    assert q[0].is_contiguous(), "the numbers of a token lie side by side"
    assert q.stride(0) % head_dim == 0, "rows of whole heads"
    assert tiles.num_parts == 1 or tiles.rows == SMALL_ROWS, "what is combined is small"
    variant = _attend_variant(
        q.dtype,
        head_dim,
        block_size,
        tiles.rows,
        has_softcap=scores.softcap is not None,
        is_fp8=key_cache.dtype == torch.uint8,
    )
    num_tiles, group = len(tiles.places), num_heads // num_kv_heads
    num_places = num_tiles * num_kv_heads * tiles.num_parts if tiles.num_parts > 1 else 0
    part_sums = torch.empty((num_places, tiles.rows, variant["D_PADDED"]), dtype=torch.float32, device=q.device)
    part_stats = torch.empty((num_places, 2, tiles.rows), dtype=torch.float32, device=q.device)
    scale = scores.scale * scores.key_scale
    score_scale = scale * _LOG2_E if scores.softcap is None else scale / scores.softcap
    ATTEND.launch(
        variant,
        (num_tiles, num_kv_heads, tiles.num_parts),
        out,
        part_sums,
        part_stats,
        q,
        key_cache,
        value_cache,
        tables,
        tiles.places,
        requests,
        score_scale,
        (scores.softcap or 0.0) * _LOG2_E,
        scores.value_scale,
        q.stride(0) // head_dim,
        num_heads,
        num_kv_heads,
        group,
        tables.shape[1],
        NO_WINDOW if window is None else window,
        tiles.num_parts,
    )
    if tiles.num_parts > 1:
        COMBINE.launch(
            _combine_variant(q.dtype, head_dim),
            (num_tiles, num_kv_heads),
            out,
            part_sums,
            part_stats,
            tiles.places,
            requests,
            scores.value_scale,
            num_heads,
            num_kv_heads,
            group,
            tiles.num_parts,
        )


def attend_twin(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    requests: torch.Tensor,
    scores: Scores,
    *,
    window: int | None,
) -> torch.Tensor:
    """All tokens, in torch and float64: [T, N, D] of the dtype of q."""
    out = torch.empty_like(q)
    group = q.shape[1] // key_cache.shape[2]
    for request, (first, query_len, context_len) in enumerate(requests.tolist()):
        slots = torch.arange(context_len)
        size = key_cache.shape[1]
        blocks, offsets = tables[request, slots // size], slots % size
        keys, values = (
            (
                decoded(cache[blocks, offsets]).double() * factor
                if cache.dtype == torch.uint8
                else cache[blocks, offsets]
            )
            .double()
            .repeat_interleave(group, dim=1)
            for cache, factor in ((key_cache, scores.key_scale), (value_cache, scores.value_scale))
        )
        products = torch.einsum("qnd,snd->nqs", q[first : first + query_len].double(), keys) * scores.scale
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        positions = torch.arange(context_len - query_len, context_len)[:, None]
        hidden = (slots > positions) | (slots <= positions - (window or NO_WINDOW))
        weights = torch.softmax(products.masked_fill(hidden, -torch.inf), dim=-1)
        out[first : first + query_len] = torch.einsum("nqs,snd->qnd", weights, values).to(q.dtype)
    return out
