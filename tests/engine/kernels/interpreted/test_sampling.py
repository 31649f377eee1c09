"""The sampling kernel equals its twin, and both keep what sampler.py keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.kernels.interpreted.conftest import launched, normal

from octavo_engine.kernels.sampling import FAILED, RowRules, exponentials_twin, kept_twin, sample, sample_twin
from octavo_engine.plan import SamplingParams
from octavo_engine.sampler import Draw
from octavo_engine.sampler import sample as sample_by_rules

if TYPE_CHECKING:
    from collections.abc import Sequence


def rules(settings: Sequence[tuple[float, int, float, float]], seed: int = 0) -> RowRules:
    """Rows of (temperature, top_k, top_p, min_p)."""
    temperatures, top_ks, top_ps, min_ps = (torch.tensor(column) for column in zip(*settings, strict=True))
    inverse = torch.where(temperatures > 0, 1 / temperatures, 0.0).float()
    seeds = torch.arange(len(settings)) * 2**33 + seed
    return RowRules(inverse, top_ks.int(), top_ps.float(), min_ps.float(), seeds)


ALONE = [(0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1)]
TOGETHER = [(0.8, 50, 0.9, 0.05), (2.0, 7, 0.5, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 5000, 0.3, 0.2), (5.0, 3, 0.99, 0.0)]


@pytest.mark.parametrize(
    ("size", "seed", "settings"),
    [
        (256, 0, ALONE + TOGETHER),
        (4608, 1, ALONE[3:]),  # more than a program reads at once
        *(
            pytest.param(size, seed, ALONE + TOGETHER, marks=pytest.mark.kernels)
            for size in (256, 9008)
            for seed in (2, 3)
        ),
    ],
)
def test_tokens_and_logprobs(size: int, seed: int, settings: list[tuple[float, int, float, float]]) -> None:
    raw = normal(len(settings), size, seed=seed) * 3
    logits = raw - normal(len(settings), size, seed=9).abs()
    logits[:, 100:200] = -torch.inf
    tokens, logprobs = launched(sample)(logits, raw, rules(settings, seed))
    expected, expected_logprobs = sample_twin(logits, raw, rules(settings, seed))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(1, 5))])
def test_of_equal_tokens_those_with_lower_ids_are_kept(seed: int) -> None:
    logits = torch.randint(-3, 3, (len(TOGETHER), 528), generator=torch.Generator().manual_seed(seed)).float()
    tokens, _ = launched(sample)(logits, logits, rules(TOGETHER, seed))
    assert torch.equal(tokens, sample_twin(logits, logits, rules(TOGETHER, seed))[0])


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = normal(5, 32)
    logits[1, 3], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    tokens, _ = launched(sample)(logits, logits, rules([(1.0, 0, 1.0, 0.0)] * 5))
    assert (tokens == FAILED).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("setting", [*ALONE[1:], *TOGETHER])
def test_what_is_kept_is_what_sampler_keeps(setting: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = setting
    logits = normal(1, 64, seed=3) * 2
    kept = kept_twin(logits[0], 0, rules([setting]))
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = [Draw(params, f"{number}") for number in range(3000)]
    seen = {result.token_id for result in sample_by_rules(logits.repeat(len(draws), 1), draws)}
    assert seen <= set(kept.nonzero()[:, 0].tolist())
    likely = ((logits[0] - logits.max()) / temperature).exp() * kept
    assert {token for token in range(64) if likely[token] / likely.sum() > 0.004} <= seen


def test_draws_have_the_distribution_of_the_logits() -> None:
    logits = normal(1, 16, seed=4)
    scores = logits[0] - torch.stack([exponentials_twin(seed, 16).log() for seed in range(4000)])
    counts = scores.argmax(1).bincount(minlength=16)
    expected = logits[0].softmax(0) * 4000
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 37.7  # 15 degrees of freedom: once in a thousand, and the seeds are fixed
