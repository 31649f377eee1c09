"""Sequences computed in pieces through any attention backend, and dense attention to compare with."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, Protocol

import torch
from tests.engine.kernels.conftest import DEVICE, INTERPRETS

from octavo_engine.attention.base import AttentionBackend, AttentionMetadata, AttentionRules, CacheShape

if TYPE_CHECKING:
    from collections.abc import Mapping

# Without a GPU this runs in a process of its own, with Triton's interpreter: tests/engine/kernels/test_interpreter.py.
collect_ignore = [] if INTERPRETS or DEVICE.type == "cuda" else ["test_triton.py"]

# Shapes: T tokens, N query heads, K KV heads, D head size.

CPU: Final = torch.device("cpu")
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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


class MakeBackend(Protocol):
    """A backend's class, or what calls it."""

    def __call__(
        self, shape: CacheShape, rules: AttentionRules, *, dtype: torch.dtype, device: torch.device
    ) -> AttentionBackend:
        """Reserve the cache."""
        ...


class Sequences:
    """Sequences with random contents, computed in arbitrary pieces through a backend and checked against `dense`."""

    def __init__(
        self,
        make_backend: MakeBackend,
        shape: CacheShape,
        *,
        num_heads: int,
        dtype: torch.dtype,
        lengths: list[int],
        rules: AttentionRules | None = None,
        tolerance: float | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.shape = shape
        self.device = device
        self.dtype = dtype
        self.tolerance = tolerance or TOLERANCE[dtype]
        self.rules = rules or AttentionRules(scale=shape.head_dim**-0.5, windows=(None,) * shape.num_layers)
        self.backend = make_backend(shape, self.rules, dtype=dtype, device=device)
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
                    ],
                    device=self.device,
                ),
                block_tables=torch.tensor(
                    [self.tables[index] + [0] * (width - len(self.tables[index])) for index in pieces],
                    device=self.device,
                ),
                query_lens=tuple(pieces.values()),
                context_lens=tuple(end for _, end in spans.values()),
            )
        )
        for layer in range(self.shape.num_layers):

            def flat(rows: list[list[torch.Tensor]], layer: int = layer) -> torch.Tensor:
                return torch.cat([rows[layer][index][slice(*span)] for index, span in spans.items()]).to(self.device)

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
            torch.testing.assert_close(
                out.cpu().double(), torch.cat(expected), atol=self.tolerance, rtol=self.tolerance
            )
        for index, (_, end) in spans.items():
            self.computed[index] = end
