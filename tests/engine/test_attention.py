"""Paged attention of every backend against dense attention computed token by token."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.attention import reference
from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape
from octavo_engine.attention.reference import ReferenceAttention

# Shapes: T tokens, N query heads, K KV heads, D head size.

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Causal attention of the last len(q) tokens of one sequence, in float64: q [Q, N, D], k and v [C, K, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for row in range(len(q)):
        end = len(k) - len(q) + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(q.shape[1]):
            keys, values = k[start:end, head // group].double(), v[start:end, head // group].double()
            scores = keys @ q[row, head].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, dim=0) @ values
    return out


class Sequences:
    """Sequences with random contents, computed in arbitrary pieces through a backend and checked against `dense`."""

    def __init__(
        self,
        shape: CacheShape,
        *,
        num_heads: int,
        dtype: torch.dtype,
        lengths: list[int],
        rules: AttentionRules | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.rules = rules or AttentionRules(scale=shape.head_dim**-0.5, windows=(None,) * shape.num_layers)
        self.backend = ReferenceAttention(shape, self.rules, dtype=dtype, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)

        def rows(num_heads: int) -> list[torch.Tensor]:
            size = (num_heads, shape.head_dim)
            return [torch.randn((length, *size), generator=generator).to(dtype) for length in lengths]

        # One of each for every layer, so that layers cannot be mixed up unnoticed.
        self.q = [rows(num_heads) for _ in range(shape.num_layers)]
        self.k = [rows(shape.num_kv_heads) for _ in range(shape.num_layers)]
        self.v = [rows(shape.num_kv_heads) for _ in range(shape.num_layers)]
        blocks = list(range(shape.num_blocks))
        random.Random(2).shuffle(blocks)  # noqa: S311 - test data
        self.tables = [[blocks.pop() for _ in range(-(-length // shape.block_size))] for length in lengths]
        self.computed = [0] * len(lengths)

    def step(self, pieces: dict[int, int]) -> None:
        """Compute so many more tokens of the sequences given, in one step, and check what comes out."""
        spans = {index: (self.computed[index], self.computed[index] + count) for index, count in pieces.items()}
        width = max(len(self.tables[index]) for index in pieces)
        size = self.shape.block_size
        self.backend.begin_step(
            AttentionMetadata(
                slot_mapping=torch.tensor(
                    [
                        self.tables[index][position // size] * size + position % size
                        for index, span in spans.items()
                        for position in range(*span)
                    ]
                ),
                block_tables=torch.tensor(
                    [self.tables[index] + [0] * (width - len(self.tables[index])) for index in pieces]
                ),
                query_lens=tuple(pieces.values()),
                context_lens=tuple(end for _, end in spans.values()),
            )
        )
        for layer in range(self.shape.num_layers):

            def flat(rows: list[list[torch.Tensor]], layer: int = layer) -> torch.Tensor:
                return torch.cat([rows[layer][index][slice(*span)] for index, span in spans.items()])

            self.backend.store(layer, flat(self.k), flat(self.v))
            out = self.backend.attend(layer, flat(self.q))
            assert out.dtype == self.dtype
            expected = [
                dense(
                    self.q[layer][index][slice(*span)],
                    self.k[layer][index][: span[1]],
                    self.v[layer][index][: span[1]],
                    scale=self.rules.scale,
                    window=self.rules.windows[layer],
                    softcap=self.rules.softcap,
                )
                for index, span in spans.items()
            ]
            tolerance = TOLERANCE[self.dtype]
            torch.testing.assert_close(out.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)
        for index, (_, end) in spans.items():
            self.computed[index] = end


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
    sequences = Sequences(shape, num_heads=num_heads, dtype=dtype, lengths=lengths)
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
    sequences = Sequences(shape, num_heads=6, dtype=dtype, lengths=[3, 17, 40], rules=rules)
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
    sequences = Sequences(shape, num_heads=4, dtype=torch.float32, lengths=lengths, rules=rules)
    while any(computed < length for computed, length in zip(sequences.computed, lengths, strict=True)):
        unfinished = [index for index, length in enumerate(lengths) if sequences.computed[index] < length]
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        sequences.step(
            {index: data.draw(st.integers(1, lengths[index] - sequences.computed[index])) for index in chosen}
        )


def test_decodes_that_gather_more_than_the_bound_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_GATHER_BYTES", 8 * 8 * 8 * 5 * 2)  # two requests of 5 blocks at a time
    shape = CacheShape(num_layers=1, num_blocks=64, block_size=8, num_kv_heads=1, head_dim=8)
    sequences = Sequences(shape, num_heads=2, dtype=torch.float32, lengths=[40, 39, 38, 37, 36])
    sequences.step(dict.fromkeys(range(5), 35))
    sequences.step(dict.fromkeys(range(5), 1))
    assert len(sequences.backend._groups) == 3


def test_a_copied_block_is_the_same_and_then_a_block_of_its_own() -> None:
    shape = CacheShape(num_layers=2, num_blocks=8, block_size=4, num_kv_heads=1, head_dim=8)
    sequences = Sequences(shape, num_heads=2, dtype=torch.float32, lengths=[9, 8])
    for rows in (*sequences.k, *sequences.v):
        rows[1][:6] = rows[0][:6]  # the second forks off the first
    sequences.step({0: 6})
    sequences.computed[1] = 6
    sequences.backend.copy_blocks(tuple(zip(sequences.tables[0][:2], sequences.tables[1], strict=True)))
    sequences.step({0: 2, 1: 2})  # compares with dense attention
    sequences.step({0: 1})


def test_what_a_block_held_before_does_not_reach_its_next_owner() -> None:
    shape = CacheShape(num_layers=1, num_blocks=4, block_size=4, num_kv_heads=1, head_dim=8)
    sequences = Sequences(shape, num_heads=1, dtype=torch.float32, lengths=[6, 3])
    backend = sequences.backend
    everything = AttentionMetadata(
        slot_mapping=torch.arange(16), block_tables=torch.arange(4)[None], query_lens=(16,), context_lens=(16,)
    )
    backend.begin_step(everything)
    poison = torch.full((16, 1, 8), float("nan"))
    backend.store(0, poison, poison)

    sequences.step({0: 5, 1: 2})  # compares with dense attention: NaN would show
    sequences.step({0: 1, 1: 1})
