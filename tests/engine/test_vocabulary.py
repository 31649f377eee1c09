"""Selections from a vocabulary without sorting it, against what sorts it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine import vocabulary


def halves(low: int, high: int) -> st.SearchStrategy[float]:
    """Multiples of a half: exact in float32, with many ties."""
    return st.integers(2 * low, 2 * high).map(lambda number: number / 2)


@given(
    values=st.lists(st.lists(halves(-2, 2), min_size=192, max_size=192), min_size=1, max_size=3),
    k=st.integers(1, 192),
)
@settings(max_examples=60, deadline=None)
def test_the_first_tokens_are_those_of_a_stable_sort(values: list[list[float]], k: int) -> None:
    rows = torch.tensor(values)
    order = rows.sort(dim=1, descending=True, stable=True)
    top, ids = vocabulary.top(rows, k)
    assert torch.equal(top, order.values[:, :k])
    assert torch.equal(ids, order.indices[:, :k])
    assert torch.equal(vocabulary.argmax(rows, vocabulary.highest_of_blocks(rows)), order.indices[:, 0])


@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 1e-30, 3.0, 1e30]), min_size=128, max_size=128).filter(any),
    uniform=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-52]), st.floats(0, 1 - 2**-52)),
)
def test_inversion_never_gives_a_token_without_weight(weights: list[float], uniform: float) -> None:
    token = vocabulary.invert(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64))
    assert weights[int(token)] > 0
