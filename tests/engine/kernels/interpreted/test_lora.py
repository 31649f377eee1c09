"""What adapters add equals the twin, and torch's layer, for rows of several adapters in any order and rows of none.

Bound: as for products, two units in the last place of the largest result; the reduced numbers are rounded alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.kernels.conftest import DEVICE
from tests.engine.kernels.interpreted.conftest import launched, normal

from octavo_engine.errors import ModelUnsupported
from octavo_engine.kernels.lora import RANKS, add_low_rank, add_low_rank_twin, tile_rows
from octavo_engine.layers.lora import TorchAdapters
from octavo_engine.layers.lora_triton import TritonAdapters
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.weights.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.models.adapter import Place
    from octavo_engine.models.family import LayerRole

DTYPES = [torch.float16, torch.bfloat16]
WIDE = pytest.mark.kernels
CPU = torch.device("cpu")

# By adapter: its rows of 90.
ONE_ROW = {1: [3]}
MIXED = {2: [0, 5, 6, 89], 0: [1, 80]}
MANY = {0: list(range(0, 90, 2)), 2: list(range(1, 70, 2))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [16, 64, *(pytest.param(rank, marks=WIDE) for rank in (*RANKS[1::2], 256))])
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        (MIXED, 208, 144),  # neither fills its last step
        (ONE_ROW, 1024, 64),  # in parts
        *(pytest.param(*each, marks=WIDE) for each in [(MANY, 320, 272), (MIXED, 4096, 512)]),
    ],
)
def test_rows_of_several_adapters(
    dtype: torch.dtype, rank: int, rows: dict[int, list[int]], features: int, columns: int
) -> None:
    x, a = normal(90, features, dtype=dtype), normal(3, rank, features, dtype=dtype, seed=2) / features**0.5
    b, wide = normal(3, columns, rank, dtype=dtype, seed=3), normal(90, columns + 32, dtype=dtype, seed=4)
    y, expected, tiles = wide[:, 16:-16], wide.clone()[:, 16:-16], tile_rows(rows, CPU)
    before = wide.clone()
    launched(add_low_rank)(y, x, a, b, tiles)
    add_low_rank_twin(expected, x, a, b, tiles)
    torch.testing.assert_close(y, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * float(expected.abs().max()))
    others = sorted(set(range(90)) - {row for its_rows in rows.values() for row in its_rows})
    assert torch.equal(wide[others], before[others])
    assert torch.equal(wide[:, :16], before[:, :16])
    assert torch.equal(wide[:, -16:], before[:, -16:])


def test_tiles_hold_rows_of_one_adapter() -> None:
    tiles = tile_rows({4: list(range(20)), 1: [7]}, CPU)
    assert tiles.rows.shape == (2, 64)
    assert tiles.adapters.tolist() == [4, 1]
    assert tiles.rows[1].tolist() == [7] + [-1] * 63
    assert tile_rows({4: list(range(16))}, CPU).rows.shape == (1, 16)


def pair(rank: int, features: int, columns: int, seed: int) -> LowRank:
    return LowRank(normal(rank, features, seed=seed) / features**0.5, normal(columns, rank, seed=seed + 1) * 0.2)


def step(*adapters_and_tokens: tuple[int, int]) -> StepPlan:
    """A step of requests with so many tokens each."""
    sampling = SamplingParams(max_tokens=1)
    requests = [
        ScheduledRequest(f"{number}", (0,) * count, 0, (), needs_token=True, sampling=sampling, adapter=adapter)
        for number, (adapter, count) in enumerate(adapters_and_tokens)
    ]
    return StepPlan(0, tuple(requests))


COLUMNS: Mapping[LayerRole, slice] = {"q": slice(64), "k": slice(64, 96), "v": slice(96, 128)}
FIRST: Mapping[Place, LowRank] = {(0, "q"): pair(4, 48, 64, 10), (0, "v"): pair(20, 48, 32, 20)}
SECOND: Mapping[Place, LowRank] = {(0, "q"): pair(3, 48, 64, 30), (0, "k"): pair(3, 48, 32, 40)}
THIRD: Mapping[Place, LowRank] = {(0, "q"): pair(140, 48, 64, 50)}  # more than a launch has


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_of_other_ranks_and_places_in_one_step_add_what_torch_adds(dtype: torch.dtype) -> None:
    there, here = TritonAdapters(dtype, DEVICE), TorchAdapters(dtype, CPU)

    def compare(plan: StepPlan, layer: int = 0) -> torch.Tensor:
        x, y = normal(plan.num_tokens, 48, dtype=dtype), normal(plan.num_tokens, 128, dtype=dtype, seed=2)
        for adapters in (there, here):
            adapters.begin_step(plan)
        added = there.add(y.to(DEVICE, copy=True), x.to(DEVICE), layer, COLUMNS).cpu()
        expected = here.add(y.clone(), x, layer, COLUMNS)
        torch.testing.assert_close(
            added, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * float(expected.abs().max())
        )
        return added - y

    for number, pairs in ((1, FIRST), (2, SECOND), (3, THIRD)):
        for adapters in (there, here):
            adapters.load(number, pairs)
    added = compare(step((2, 1), (0, 3), (1, 20), (3, 1), (2, 2)))
    assert added[[0, 4, 24]].any(1).all()
    assert not added[1:4].any()
    assert not added[24, 64:].any(), "the third adds to queries alone"
    assert not compare(step((1, 3), (2, 1)), layer=1).any()
    assert not compare(step((0, 5))).any()
    for adapters in (there, here):
        adapters.unload(1)
    compare(step((3, 2), (2, 1)))
    for number in (2, 3):
        for adapters in (there, here):
            adapters.unload(number)
    assert not there._stacks
    for adapters in (there, here):
        adapters.load(4, SECOND)
    assert compare(step((4, 2))).any()


def test_what_the_kernels_cannot_read_is_refused_by_name_and_not_taken() -> None:
    adapters = TritonAdapters(torch.float16, DEVICE)
    with pytest.raises(ModelUnsupported, match=r"adds to k of layer 2, which is 24 x 48: .* multiples of 16"):
        adapters.load(1, {(0, "q"): pair(4, 48, 64, 10), (2, "k"): pair(4, 48, 24, 20)})
    assert not adapters._stacks
