"""Choosing tokens on the GPU: the rules that need tables by sampler.py's torch, the choice itself by a kernel.

The tokens stay on the device, where the next step can take them, and are copied to the host without waiting for them.
A draw is a function of its seed and the logits alone, but not the one that sampler.py has: see kernels/sampling.py.

Shapes: S rows, V vocabulary, L the most logprobs that a row asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from octavo_engine import sampler, vocabulary
from octavo_engine.gpu.accelerator import send
from octavo_engine.kernels.sampling import FAILED, RowRules
from octavo_engine.plan import RequestResult, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.gpu.accelerator import Accelerator, Mark
    from octavo_engine.kernels.suite import Suite
    from octavo_engine.sampler import Draw

_NOT_FINITE: Final = "the model computed NaN or infinite logits"


@dataclass(frozen=True, slots=True)
class _Top:
    """The most likely tokens of the rows that tell logprobs, on the host once the mark is awaited."""

    rows: list[int]
    ids: torch.Tensor  # int64 [rows, L]
    logprobs: torch.Tensor  # float32 [rows, L]


@dataclass(frozen=True, slots=True)
class DeviceDraws:
    """Tokens that the device is choosing. See sampler.Draws."""

    tokens: torch.Tensor  # int32 [S], on the device; negative where there is none
    _draws: Sequence[Draw]
    _failures: dict[int, str]
    _copied_tokens: torch.Tensor
    _copied_logprobs: torch.Tensor  # float32 [S]
    _top: _Top | None
    _copied: Mark

    def results(self) -> list[RequestResult]:
        """See sampler.Draws: waits for the copy of the tokens, and not for what was queued after it."""
        self._copied.wait()
        tokens, own = self._copied_tokens.tolist(), self._copied_logprobs.tolist()
        tops = {} if self._top is None else self._tops(self._top)
        results = []
        for row, (token_id, draw) in enumerate(zip(tokens, self._draws, strict=True)):
            if token_id == FAILED:
                results.append(RequestResult(error=self._failures.get(row, _NOT_FINITE)))
            elif draw.sampling.num_logprobs is None:
                results.append(RequestResult(token_id=token_id))
            else:
                told = TokenLogprobs(own[row], tops.get(row, ())[: draw.sampling.num_logprobs])
                results.append(RequestResult(token_id=token_id, logprobs=told))
        return results

    @staticmethod
    def _tops(top: _Top) -> dict[int, tuple[tuple[int, float], ...]]:
        pairs = zip(top.rows, top.ids.tolist(), top.logprobs.tolist(), strict=True)
        return {row: tuple(zip(ids, logprobs, strict=True)) for row, ids, logprobs in pairs}


class DeviceSampler:
    """Chooses tokens by the sampling kernel. See sampler.Sampler."""

    def __init__(self, accelerator: Accelerator, kernels: Suite) -> None:
        self._accelerator, self._kernels = accelerator, kernels

    def begin(self, logits: torch.Tensor, draws: Sequence[Draw]) -> DeviceDraws:
        """See sampler.Sampler."""
        vocab_size = logits.shape[1]
        logits = vocabulary.padded(logits.float())
        nums = {row: num for row, draw in enumerate(draws) if (num := draw.sampling.num_logprobs) is not None}
        raw = logits.clone() if nums else logits
        failures = sampler.apply_rules(logits, draws)
        tokens, logprobs = self._kernels.sample(logits, raw, self._rules(draws))
        download = self._accelerator.download
        top = None
        if most := min(max(nums.values(), default=0), vocab_size):
            rows = [row for row, num in nums.items() if num]
            top = self._top(raw, rows, most)
        copied = (download(tokens), download(logprobs))
        return DeviceDraws(tokens, draws, failures, *copied, top, self._accelerator.mark())

    def _top(self, raw: torch.Tensor, rows: list[int], most: int) -> _Top:
        (index,) = send(self._accelerator, [np.array(rows)])
        told = raw.index_select(0, index)
        values, ids = vocabulary.top(told, most)
        logprobs = values - told.logsumexp(dim=1, keepdim=True)
        return _Top(rows, self._accelerator.download(ids), self._accelerator.download(logprobs))

    def _rules(self, draws: Sequence[Draw]) -> RowRules:
        """What each row asks for, in one copy: the seeds, then four columns of half the width."""
        params = [draw.sampling for draw in draws]
        size = -(-len(draws) // 4) * 4  # so that every column begins at a multiple of 16 bytes
        seeds = np.zeros(size, dtype=np.int64)
        seeds[: len(draws)] = [draw.seed for draw in draws]
        columns = np.zeros((4, size), dtype=np.float32)
        inverses = [0.0 if draw.is_greedy else sampler.inverse_temperature(draw) for draw in draws]
        for column, values in enumerate((inverses, [p.top_p for p in params], [p.min_p for p in params])):
            columns[column, : len(draws)] = values
        columns[3].view(np.int32)[: len(draws)] = [p.top_k for p in params]
        on_device, halves = send(self._accelerator, (seeds, columns.reshape(-1).view(np.int64)))
        inverse, top_ps, min_ps, top_ks = halves.view(torch.float32).view(4, size)[:, : len(draws)]
        return RowRules(
            inverse_temperatures=inverse,
            top_ks=top_ks.view(torch.int32),
            top_ps=top_ps,
            min_ps=min_ps,
            seeds=on_device[: len(draws)],
        )
