"""What LoRA adapters add to a product: y += (x A^T) B^T for rows of several adapters at once (Hu et al. 2021).

Rows come in tiles of one adapter each, as in Punica (Chen et al. 2023); `tile_rows` lays them out. One launch computes
x A^T of every tile, cut along the inner dimension where there are few tiles, and a second one adds up the parts,
multiplies with B and adds that to y: no number is written by two programs, so that the same call always gives the same.

Shapes: T rows of the step, N tiles of H rows, I features in, O features out, L adapters, R the rank that all of them
are filled up to with zeros: one of RANKS, or a multiple of the last, which takes so many launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from octavo_engine.kernels import matmul
from octavo_engine.kernels.launch import Kernel, Target, Variant, ceil_div, num_processors, pointer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RANKS: Final = (16, 32, 64, 128)
_STEP: Final = 64  # numbers along I at once
_COLUMNS: Final = 128


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which rows have which adapter."""

    rows: torch.Tensor  # int32 [N, H]; -1: none
    adapters: torch.Tensor  # int32 [N], below L


@triton.jit(do_not_specialize=["a_rank16", "features16", "x_stride16", "num_steps", "share"])
def _reduce_rank(
    out,
    x,
    a,
    rows,
    adapters,
    a_rank16,
    features16,
    x_stride16,
    num_steps,
    share,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Program (tile, part of the steps): its part of x A^T."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    features = features16 * 16
    place = tl.arange(0, ROWS)
    row = tl.load(rows + tile * ROWS + place)
    is_row = row >= 0
    x_rows = x + row.to(tl.int64)[:, None] * x_stride16 * 16
    rank = tl.arange(0, RANK)
    a_rows = a + (tl.load(adapters + tile).to(tl.int64) * a_rank16 * 16 + rank)[:, None] * features
    in_step = tl.arange(0, STEP)
    sums = tl.zeros([ROWS, RANK], tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, num_steps)):
        feature = step * STEP + in_step
        inside = feature < features
        inputs = tl.load(x_rows + feature[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        weights = tl.load(a_rows + feature[None, :], mask=inside[None, :], other=0.0)
        sums = tl.dot(inputs, tl.trans(weights), sums)
    target = out + ((part * tl.num_programs(0) + tile) * ROWS + place).to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(target, sums)


@triton.jit(do_not_specialize=["b_rank16", "columns16", "y_stride16", "num_parts", "part_size"])
def _add_expanded(
    y,
    reduced,
    b,
    rows,
    adapters,
    b_rank16,
    columns16,
    y_stride16,
    num_parts,
    part_size,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tile, columns): adds the sum of the parts, times B^T."""
    tile = tl.program_id(0)
    columns = columns16 * 16
    place = tl.arange(0, ROWS)
    row = tl.load(rows + tile * ROWS + place)
    rank = tl.arange(0, RANK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    source = reduced + (tile * ROWS + place).to(tl.int64)[:, None] * RANK + rank[None, :]
    inputs = tl.zeros([ROWS, RANK], tl.float32)
    for _ in range(num_parts):
        inputs += tl.load(source)
        source += part_size
    b_rows = b + (tl.load(adapters + tile).to(tl.int64) * columns + column)[:, None] * b_rank16 * 16
    weights = tl.load(b_rows + rank[None, :], mask=is_column[:, None], other=0.0)
    added = tl.dot(inputs.to(weights.dtype), tl.trans(weights))
    target = y + row.to(tl.int64)[:, None] * y_stride16 * 16 + column[None, :]
    inside = (row >= 0)[:, None] & is_column[None, :]
    own = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (own + added).to(y.dtype.element_ty), mask=inside)


def _reduce_variant(dtype: torch.dtype, rows: int, rank: int) -> Variant:
    types = ("*fp32", pointer(dtype), pointer(dtype), "*i32", "*i32", *("i32",) * 5)
    constants = (("STEP", _STEP), ("ROWS", rows), ("RANK", rank))
    return Variant(types, constants, num_warps=4, num_stages=3)


def _expand_variant(dtype: torch.dtype, rows: int, rank: int) -> Variant:
    types = (pointer(dtype), "*fp32", pointer(dtype), "*i32", "*i32", *("i32",) * 5)
    constants = (("ROWS", rows), ("RANK", rank), ("COLUMNS", _COLUMNS))
    return Variant(types, constants, num_warps=4 if rows == matmul.ROWS[0] else 8)


def _shapes() -> Iterator[tuple[torch.dtype, int, int]]:
    return ((dtype, rows, rank) for dtype in matmul.DTYPES for rows in matmul.ROWS for rank in RANKS)


def _reduce_variants(_target: Target) -> Iterator[Variant]:
    return (_reduce_variant(*shape) for shape in _shapes())


def _expand_variants(_target: Target) -> Iterator[Variant]:
    return (_expand_variant(*shape) for shape in _shapes())


REDUCE_RANK: Final = Kernel(_reduce_rank, _reduce_variants)
ADD_EXPANDED: Final = Kernel(_add_expanded, _expand_variants)


def tile_rows(rows: Mapping[int, Sequence[int]], device: torch.device) -> Tiles:
    """Lay out the rows of each adapter of a step, at least one.

    Args:
        rows: by adapter, its index below L.
        device: of the tiles.
    """
    height = matmul.rows_for(max(map(len, rows.values())))
    tiles = [
        (adapter, list(its_rows[start : start + height]))
        for adapter, its_rows in rows.items()
        for start in range(0, len(its_rows), height)
    ]
    padded = [some + [-1] * (height - len(some)) for _, some in tiles]
    adapters = [adapter for adapter, _ in tiles]
    return Tiles(*(torch.tensor(each, dtype=torch.int32, device=device) for each in (padded, adapters)))


def add_low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, tiles: Tiles) -> None:
    """Add to the rows of y what their adapters give for those of x.

    Args:
        y: float16 or bfloat16 [T, O], changed in place; each row contiguous, rows may be parts of longer ones.
        x: the same dtype [T, I], likewise; O and I are multiples of 16.
        a: the same dtype [L, R, I], contiguous.
        b: the same dtype [L, O, R], contiguous; the scale is in it.
        tiles: which rows have which adapter.
    """
    (count, height), (_, rank, features), columns = tiles.rows.shape, a.shape, b.shape[1]
    assert y.stride(1) == x.stride(1) == 1, "the numbers of a row lie side by side"
    assert y.stride(0) % 16 == x.stride(0) % 16 == features % 16 == columns % 16 == 0, "loads of 16 bytes"
    assert a.is_contiguous(), "adapters lie side by side"
    assert b.is_contiguous(), "adapters lie side by side"
    launched = min(rank, RANKS[-1])
    reduce, expand = _reduce_variant(x.dtype, height, launched), _expand_variant(x.dtype, height, launched)
    num_steps = ceil_div(features, _STEP)
    parts = matmul.parts_for(count, num_steps, num_processors(x.device))
    reduced = torch.empty((parts, count * height, launched), dtype=torch.float32, device=x.device)
    steps = (features // 16, x.stride(0) // 16, num_steps, ceil_div(num_steps, parts))
    sizes = (columns // 16, y.stride(0) // 16, parts, reduced[0].numel())
    grid = (count, ceil_div(columns, expand["COLUMNS"]))
    which = (tiles.rows, tiles.adapters, rank // 16)
    for first in range(0, rank, launched):
        REDUCE_RANK.launch(reduce, (count, parts), reduced, x, a[:, first:], *which, *steps)
        ADD_EXPANDED.launch(expand, grid, y, reduced, b[:, :, first:], *which, *sizes)


def add_low_rank_twin(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, tiles: Tiles) -> None:
    """The same in torch."""
    for its_rows, adapter in zip(tiles.rows.tolist(), tiles.adapters.tolist(), strict=True):
        rows = [row for row in its_rows if row >= 0]
        reduced = (x[rows].float() @ a[adapter].float().T).to(x.dtype)
        y[rows] = (y[rows].float() + reduced.float() @ b[adapter].float().T).to(y.dtype)
