"""How tokens are chosen: each rule by itself, and that a row depends on nothing but itself."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.plan import SamplingParams, ScheduledRequest
from octavo_engine.sampler import Draw, draw_for, sample


def params(**options: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type] # ints are floats here


def request(request_id: str = "a", position: int = 5, **options: float) -> ScheduledRequest:
    return ScheduledRequest(request_id, (1,), position - 1, (0,), needs_token=True, sampling=params(**options))


def choose(probabilities: list[float], sampling: SamplingParams, num_draws: int = 2000) -> dict[int, float]:
    """The share of each token over evenly spaced draws."""
    logits = torch.tensor(probabilities).log().expand(num_draws, -1)
    results = sample(logits, [Draw(sampling, (row + 0.5) / num_draws) for row in range(num_draws)])
    counts = Counter(result.token_id for result in results)
    assert None not in counts
    return {token: count / num_draws for token, count in sorted(counts.items()) if token is not None}


def test_temperature_zero_takes_the_most_likely_token_whatever_the_draw() -> None:
    assert choose([0.2, 0.5, 0.3], params(temperature=0)) == {1: 1.0}


def test_of_equal_logits_greedy_takes_the_first() -> None:
    assert sample(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), [Draw(params(temperature=0), 0.9)])[0].token_id == 1


def test_temperature_one_follows_the_probabilities() -> None:
    assert choose([0.1, 0.0, 0.6, 0.3], params()) == pytest.approx({0: 0.1, 2: 0.6, 3: 0.3}, abs=0.002)


def test_temperature_sharpens_or_flattens() -> None:
    assert choose([0.8, 0.2], params(temperature=0.5)) == pytest.approx({0: 16 / 17, 1: 1 / 17}, abs=0.002)
    assert choose([0.8, 0.2], params(temperature=2)) == pytest.approx({0: 2 / 3, 1: 1 / 3}, abs=0.002)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert choose([0.2, 0.5, 0.3], params(temperature=temperature), 10) == {1: 1.0}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert choose([0.1, 0.4, 0.2, 0.3], params(top_k=2)) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.002)
    assert choose([0.25, 0.25, 0.25, 0.25], params(top_k=3)) == pytest.approx(dict.fromkeys(range(3), 1 / 3), abs=0.002)
    assert len(choose([0.1, 0.4, 0.2, 0.3], params(top_k=99))) == 4


def test_top_p_keeps_the_smallest_set_that_reaches_the_share() -> None:
    probabilities = [0.15, 0.5, 0.05, 0.3]
    assert set(choose(probabilities, params(top_p=0.45))) == {1}
    assert set(choose(probabilities, params(top_p=0.75))) == {1, 3}
    assert set(choose(probabilities, params(top_p=0.9))) == {0, 1, 3}
    assert set(choose(probabilities, params(top_p=1e-9))) == {1}
    assert choose(probabilities, params(top_p=0.75)) == pytest.approx({1: 5 / 8, 3: 3 / 8}, abs=0.002)


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert set(choose([0.1, 0.5, 0.15, 0.25], params(min_p=0.25))) == {1, 2, 3}
    assert set(choose([0.1, 0.5, 0.15, 0.25], params(min_p=1))) == {1}


def test_top_p_counts_what_top_k_and_min_p_have_left() -> None:
    # After top-k 2 the shares are 5/9 and 4/9, so 0.5 is reached by the first alone.
    assert set(choose([0.5, 0.4, 0.1], params(top_p=0.5, top_k=2))) == {0}
    # After min-p 0.7 the same two are left.
    assert set(choose([0.5, 0.4, 0.1], params(top_p=0.5, min_p=0.7))) == {0}
    assert set(choose([0.48, 0.42, 0.1], params(top_p=0.5))) == {0, 1}


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    almost_one = 1 - 2**-52
    drawn = [sample(logits, [Draw(params(), uniform)])[0].token_id for uniform in (0.0, 0.49, 0.51, almost_one)]
    assert drawn == [1, 1, 3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    draws = [Draw(params(temperature=temperature, top_p=0.9), 0.3)] * 3
    clean = sample(logits, draws)
    logits[1, 7] = bad
    mixed = sample(logits, draws)
    assert mixed[1].token_id is None
    assert "NaN or infinite" in (mixed[1].error or "")
    assert (mixed[0], mixed[2]) == (clean[0], clean[2])


def test_a_row_that_forbids_every_token_is_an_error() -> None:
    assert sample(torch.full((1, 4), -math.inf), [Draw(params(), 0.5)])[0].error


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 1.7]),
            st.sampled_from([0, 1, 5]),
            st.sampled_from([0.3, 0.9, 1.0]),
            st.sampled_from([0.0, 0.2]),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_row_gets_the_same_token_alone_as_in_any_batch(rows: list[tuple[float, int, float, float, float]]) -> None:
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(len(rows))) * 3
    draws = [
        Draw(params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), uniform)
        for temperature, top_k, top_p, min_p, uniform in rows
    ]
    together = sample(logits, draws)
    assert together == [sample(logits[row : row + 1], draws[row : row + 1])[0] for row in range(len(rows))]


def test_a_draw_depends_on_seed_and_position_only() -> None:
    assert draw_for(request("a", seed=7), 0).uniform == draw_for(request("b", seed=7), 1).uniform
    assert draw_for(request("a", seed=7), 0).uniform != draw_for(request("a", seed=8), 0).uniform
    assert (
        draw_for(request("a", position=5, seed=7), 0).uniform != draw_for(request("a", position=6, seed=7), 0).uniform
    )


def test_a_prompt_in_one_piece_draws_as_one_in_several() -> None:
    whole = ScheduledRequest("a", (1, 2, 3), 0, (0,), needs_token=True, sampling=params(seed=3))
    rest = ScheduledRequest("a", (3,), 2, (0,), needs_token=True, sampling=params(seed=3))
    assert draw_for(whole, 0) == draw_for(rest, 0)


def test_without_a_seed_the_engines_seed_and_the_request_decide() -> None:
    assert draw_for(request("a"), 0) == draw_for(request("a"), 0)
    assert draw_for(request("a"), 0).uniform != draw_for(request("b"), 0).uniform
    assert draw_for(request("a"), 0).uniform != draw_for(request("a"), 1).uniform


def test_draws_over_positions_are_uniform() -> None:
    uniforms = [draw_for(request(position=position, seed=1), 0).uniform for position in range(1, 4001)]
    assert all(0 <= uniform < 1 for uniform in uniforms)
    shares = Counter(int(uniform * 10) for uniform in uniforms)
    assert all(abs(shares[tenth] / 4000 - 0.1) < 0.025 for tenth in range(10))  # five standard deviations
