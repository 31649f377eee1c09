"""The distribution of the tokens drawn, against a plain definition that sorts one row in float64 and knows no torch.

The random numbers are functions of fixed seeds, so that a run decides as every other one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine import sampler
from octavo_engine.past import PastTokens
from octavo_engine.plan import SamplingParams
from octavo_engine.sampler import Draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.plan import RequestResult
    from octavo_engine.sampler import Chooser

IN_USE: list[Chooser | None] = []


@pytest.fixture(scope="module", autouse=True, params=["torch", "the CPU library"])
def chooser(request: pytest.FixtureRequest, cpu_chooser: Chooser) -> None:
    """Every test runs with both."""
    IN_USE[:] = [cpu_chooser if request.param == "the CPU library" else None]


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[RequestResult]:
    """As sampler.sample, with what is in use."""
    return sampler.sample(logits, draws, IN_USE[0])


@dataclass
class Case:
    """Logits, what the request has had, and its rules."""

    logits: list[float]
    prompt: list[int]
    output: list[int]
    rules: dict[str, Any]


def distribution(case: Case) -> dict[int, float]:
    """The probability of each token that the rules leave: one rule after the other, in the order that they have."""
    rules = case.rules
    logits = np.array(case.logits, dtype=np.float64)
    for token, bias in rules.get("logit_bias", ()):
        logits[token] += bias
    for token in {*case.prompt, *case.output}:
        factor = rules.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in case.output:
        logits[token] -= rules.get("frequency_penalty", 0.0)
    for token in set(case.output):
        logits[token] -= rules.get("presence_penalty", 0.0)
    logits /= rules.get("temperature", 1.0)
    weights = {token: math.exp(logit - logits.max()) for token, logit in enumerate(logits)}
    weights = {token: weight for token, weight in weights.items() if weight >= rules.get("min_p", 0.0)}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    if rules.get("top_k", 0) > 0:
        order = order[: rules["top_k"]]
    total, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if before >= rules.get("top_p", 1.0) * total:
            break
        kept.append(token)
        before += weights[token]
    return {token: weights[token] / before for token in kept}


def drawn(case: Case, num_draws: int) -> dict[int, float]:
    """The share of each token over many draws."""
    past = PastTokens(case.prompt, ())
    for token in case.output:
        past.add(token)
    sampling = SamplingParams(max_tokens=1, **case.rules)
    draws = [Draw(sampling, f"7@{number}", past) for number in range(num_draws)]
    counts = Counter(result.token_id for result in sample(torch.tensor([case.logits]).repeat(num_draws, 1), draws))
    return {token: count / num_draws for token, count in counts.items() if token is not None}


def halves(low: int, high: int) -> st.SearchStrategy[float]:
    """Multiples of a half: exact in float32, with many ties."""
    return st.integers(2 * low, 2 * high).map(lambda number: number / 2)


TOKENS = st.lists(st.integers(0, 19), max_size=8)
CASES = st.builds(
    Case,
    logits=st.lists(halves(-3, 3), min_size=20, max_size=20),
    prompt=TOKENS,
    output=TOKENS,
    rules=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.5, 1.0, 2.0]),
            "top_p": st.sampled_from([0.013, 0.31, 0.77, 0.93]),
            "top_k": st.sampled_from([0, 1, 3, 19, 20, 400]),
            "min_p": st.sampled_from([0.07, 0.41]),
            "repetition_penalty": st.sampled_from([0.5, 2.0]),
            "presence_penalty": st.sampled_from([-1.0, 0.5]),
            "frequency_penalty": st.sampled_from([-0.5, 1.0]),
            "logit_bias": st.sampled_from([((0, 100.0),), ((3, -100.0), (4, 1.5))]),
        },
    ),
)


@given(case=CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tokens_follow_the_plain_definition_under_all_rules_together(case: Case) -> None:
    expected = distribution(case)
    shares = drawn(case, 1500)
    assert set(shares) <= set(expected)
    distance = sum(abs(shares.get(token, 0.0) - share) for token, share in expected.items()) / 2
    assert distance < 0.5 * math.sqrt(len(expected) / 1500) + 0.02  # the mean is at most 0.4 of the root


@pytest.mark.parametrize(
    "rules",
    [{}, {"top_p": 0.6}, {"top_p": 0.05}, {"top_k": 150}, {"top_k": 400, "top_p": 0.8, "min_p": 0.1}, {"min_p": 0.3}],
    ids=str,
)
def test_a_chi_square_test_finds_no_difference_over_a_thousand_tokens(rules: dict[str, Any]) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)).tolist()
    case = Case(logits, [], [], rules)
    expected = distribution(case)
    num_draws = 20_000
    shares = drawn(case, num_draws)
    assert set(shares) <= set(expected)
    statistic = sum((shares.get(token, 0.0) - share) ** 2 / share * num_draws for token, share in expected.items())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
