"""What the matrix products with packed weights share: the size of a tile, and cutting it along the inner dimension.

A decode has few rows: all programs that its columns give are fewer than a GPU runs at once. Then each product is cut
into parts along the inner dimension, and the parts are added up in float32 by a second, small launch: not by atomic
additions, so that the same call always gives the same numbers.

Shapes: R rows, I features in, O features out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from octavo_engine.kernels.launch import Kernel, Variant, ceil_div, num_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES: Final = (torch.float16, torch.bfloat16)
ROWS: Final = (16, 64)  # of a tile
_MAX_PARTS: Final = 8
_STEPS_A_PART: Final = 4  # fewer are not worth a part


def rows_for(rows: int) -> int:
    """The height of the tiles for so many rows."""
    return next((height for height in ROWS if rows <= height), ROWS[-1])


def parts_for(num_programs: int, num_steps: int, processors: int) -> int:
    """Into how many parts to cut the inner loop of so many steps, so that each multiprocessor has two programs."""
    return max(1, min(2 * processors // num_programs, num_steps // _STEPS_A_PART, _MAX_PARTS))


def multiply(
    kernel: Kernel,
    choose: Callable[[torch.dtype, int], Variant],
    args: Sequence[torch.Tensor | float],
    *,
    rows: int,
    columns: int,
    num_steps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Launch a product, in parts if need be.

    Args:
        kernel: takes the output, `args`, rows, columns / 16, steps and steps of a part.
        choose: its variant for a dtype of the output and a height of tiles; its constant COLUMNS is their width.
        args: of the kernel.
        rows: R.
        columns: O, a multiple of 16.
        num_steps: of the loop along I.
        dtype: of what comes out.
        device: where.

    Returns:
        [R, O].
    """
    assert columns % 16 == 0, "stores of 16 bytes"
    height = rows_for(rows)
    tiles = (ceil_div(rows, height), ceil_div(columns, choose(dtype, height)["COLUMNS"]))
    parts = parts_for(tiles[0] * tiles[1], num_steps, num_processors(device))
    part_dtype = dtype if parts == 1 else torch.float32
    out = torch.empty((parts, rows, columns), dtype=part_dtype, device=device)
    share = ceil_div(num_steps, parts)
    sizes = (rows, columns // 16, num_steps, share)
    kernel.launch(choose(part_dtype, height), (*tiles, parts), out, *args, *sizes)
    return out[0] if parts == 1 else out.sum(0).to(dtype)
