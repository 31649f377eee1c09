"""How tokens are chosen: each rule by itself, and that a row depends on nothing but itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine import sampler
from octavo_engine.past import PastTokens
from octavo_engine.plan import SamplingParams, ScheduledRequest
from octavo_engine.sampler import Draw, draws_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.plan import RequestResult
    from octavo_engine.sampler import Chooser

NEVER = -math.inf

IN_USE: list[Chooser | None] = []


@pytest.fixture(scope="module", autouse=True, params=["torch", "the CPU library"])
def chooser(request: pytest.FixtureRequest, cpu_chooser: Chooser) -> None:
    """Every test runs with both."""
    IN_USE[:] = [cpu_chooser if request.param == "the CPU library" else None]


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[RequestResult]:
    """As sampler.sample, with what is in use."""
    return sampler.sample(logits, draws, IN_USE[0])


def params(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)


def request(request_id: str = "a", position: int = 5, **options: Any) -> ScheduledRequest:
    return ScheduledRequest(request_id, (1,), position - 1, (0,), needs_token=True, sampling=params(**options))


def draw_for(request: ScheduledRequest, engine_seed: int, choice: int = 0) -> Draw:
    (draw,) = draws_for(msgspec.structs.replace(request, choice=choice), engine_seed)
    return draw


def past(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), stop: tuple[int, ...] = ()) -> PastTokens:
    tokens = PastTokens(prompt, stop)
    for token_id in output:
        tokens.add(token_id)
    return tokens


def draw(sampling: SamplingParams, number: int = 0, tokens: PastTokens | None = None) -> Draw:
    return Draw(sampling, f"test@{number}", tokens)


def choose(probabilities: list[float], sampling: SamplingParams, num_draws: int = 4000) -> dict[int, float]:
    """The share of each token over many draws."""
    logits = torch.tensor(probabilities).log().repeat(num_draws, 1)
    results = sample(logits, [draw(sampling, number) for number in range(num_draws)])
    counts = Counter(result.token_id for result in results)
    assert None not in counts
    return {token: count / num_draws for token, count in sorted(counts.items()) if token is not None}


def greedy(logits: list[float], sampling: dict[str, Any], tokens: PastTokens | None = None) -> list[int]:
    """All tokens from the most likely on, as greedy sampling sees them after the rules."""
    order: list[int] = []
    for _ in logits:
        left = torch.tensor([logits])
        left[0, order] = NEVER
        chosen = sample(left, [draw(params(temperature=0, **sampling), 0, tokens)])[0].token_id
        assert chosen is not None
        order.append(chosen)
    return order


def about(shares: dict[int, float]) -> Any:
    return pytest.approx(shares, abs=0.025)  # three standard deviations of 4,000 draws


def test_temperature_zero_takes_the_most_likely_token_whatever_the_draw() -> None:
    assert choose([0.2, 0.5, 0.3], params(temperature=0)) == {1: 1.0}


def test_of_equal_logits_greedy_takes_the_first() -> None:
    logits = torch.zeros(1, 500)
    logits[0, [77, 130, 131, 400]] = 2.0
    assert sample(logits, [draw(params(temperature=0))])[0].token_id == 77


def test_temperature_one_follows_the_probabilities() -> None:
    assert choose([0.1, 0.0, 0.6, 0.3], params()) == about({0: 0.1, 2: 0.6, 3: 0.3})


def test_temperature_sharpens_or_flattens() -> None:
    assert choose([0.8, 0.2], params(temperature=0.5)) == about({0: 16 / 17, 1: 1 / 17})
    assert choose([0.8, 0.2], params(temperature=2)) == about({0: 2 / 3, 1: 1 / 3})
    assert choose([0.999, 0.001, 0.0], params(temperature=1e300)) == about({0: 0.5, 1: 0.5})


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert choose([0.2, 0.5, 0.3], params(temperature=temperature), 10) == {1: 1.0}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert choose([0.1, 0.4, 0.2, 0.3], params(top_k=2)) == about({1: 4 / 7, 3: 3 / 7})
    assert choose([0.1, 0.4, 0.2, 0.3], params(top_k=1)) == {1: 1.0}
    assert choose([0.25, 0.25, 0.25, 0.25], params(top_k=3)) == about(dict.fromkeys(range(3), 1 / 3))
    assert len(choose([0.1, 0.4, 0.2, 0.3], params(top_k=99))) == 4


def test_top_p_keeps_the_smallest_set_that_reaches_the_share() -> None:
    probabilities = [0.15, 0.5, 0.05, 0.3]
    assert set(choose(probabilities, params(top_p=0.45))) == {1}
    assert set(choose(probabilities, params(top_p=0.75))) == {1, 3}
    assert set(choose(probabilities, params(top_p=0.9))) == {0, 1, 3}
    assert set(choose(probabilities, params(top_p=1e-9))) == {1}
    assert choose(probabilities, params(top_p=0.75)) == about({1: 5 / 8, 3: 3 / 8})


def test_of_equally_likely_tokens_top_p_keeps_the_first() -> None:
    assert choose([0.125] * 8, params(top_p=0.5)) == about(dict.fromkeys(range(4), 1 / 4))
    assert choose([0.125] * 8, params(top_p=1e-9)) == {0: 1.0}


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert set(choose([0.1, 0.5, 0.15, 0.25], params(min_p=0.25))) == {1, 2, 3}
    assert set(choose([0.1, 0.5, 0.15, 0.25], params(min_p=1))) == {1}


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_p_counts_what_top_k_and_min_p_have_left(top_k: int) -> None:
    # After top-k 2 the shares are 5/9 and 4/9, so 0.5 is reached by the first alone.
    assert set(choose([0.5, 0.4, 0.1], params(top_p=0.5, top_k=2))) == {0}
    # After min-p 0.7 the same two are left.
    assert set(choose([0.5, 0.4, 0.1, 0.0], params(top_p=0.5, min_p=0.7, top_k=top_k))) == {0}
    assert set(choose([0.48, 0.42, 0.1, 0.0], params(top_p=0.5, top_k=top_k))) == {0, 1}


def test_presence_counts_a_token_of_the_output_once_and_frequency_each_time() -> None:
    seen = past(prompt=(3,), output=(0, 0, 0, 1))
    assert greedy([4.0, 3.5, 3.0, 2.5], {"presence_penalty": 0.75}, seen) == [0, 2, 1, 3]
    assert greedy([4.0, 3.5, 3.0, 2.5], {"frequency_penalty": 0.75}, seen) == [2, 1, 3, 0]
    assert greedy([4.0, 3.5, 3.0, 2.5], {"frequency_penalty": -0.75, "presence_penalty": -1}, seen) == [0, 1, 2, 3]


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    seen = past(prompt=(0, 0), output=(2,))
    assert greedy([3.0, 2.0, -1.0, -1.5], {"repetition_penalty": 2.0}, seen) == [1, 0, 3, 2]
    assert greedy([1.0, 1.5, -4.0, -3.0], {"repetition_penalty": 0.5}, seen) == [0, 1, 2, 3]


def test_repetition_comes_before_presence_and_both_before_temperature() -> None:
    seen = past(output=(0,))
    # 4 / 2 - 1 = 1 against log 3 of the other: shares in proportion to exp(1 / 0.5) and 9.
    sampling = params(repetition_penalty=2.0, presence_penalty=1.0, temperature=0.5)
    logits = torch.tensor([[4.0, math.log(3)]]).repeat(4000, 1)
    results = sample(logits, [draw(sampling, number, seen) for number in range(4000)])
    share = sum(result.token_id == 0 for result in results) / 4000
    assert share == pytest.approx(math.exp(2) / (math.exp(2) + 9), abs=0.025)


def test_bias_is_added_to_logits_and_penalised_as_part_of_them() -> None:
    assert greedy([1.0, 2.0, 3.0], {"logit_bias": ((0, 1.5), (2, -100.0))}) == [0, 1, 2]
    assert greedy([1.0, 2.0, 3.0], {"logit_bias": ((1, 100.0),)}) == [1, 2, 0]
    # (1 + 3) / 4 = 1, where 1 / 4 + 3 would have won.
    assert greedy([1.0, 2.0], {"logit_bias": ((0, 3.0),), "repetition_penalty": 4.0}, past(output=(0,))) == [1, 0]


def test_what_would_end_a_request_is_forbidden_until_it_has_its_minimum_of_tokens() -> None:
    for num_generated, expected in ((0, 1), (1, 1), (2, 0)):
        seen = past(output=(5,) * num_generated, stop=(0, 2, 10**9))
        logits = torch.tensor([[9.0, 1.0, 8.0, 0.0]])
        assert sample(logits, [draw(params(min_tokens=2, temperature=0), 0, seen)])[0].token_id == expected


def test_ids_outside_of_the_vocabulary_concern_no_token() -> None:
    seen = past(prompt=(-1, 4, 10**6), output=(4, 70))
    assert greedy([1.0, 2.0], {"repetition_penalty": 2.0, "logit_bias": ((64, 5.0), (-2, 5.0))}, seen) == [1, 0]


def test_logprobs_are_those_of_the_model_before_any_rule() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    sampling = params(
        num_logprobs=2, temperature=0, logit_bias=((0, 50.0),), repetition_penalty=3.0, presence_penalty=1.0
    )
    result = sample(logits, [draw(sampling, 0, past(output=(1,)))])[0]
    assert result.token_id == 0
    assert result.logprobs is not None
    assert result.logprobs.logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token for token, _ in result.logprobs.top] == [1, 3]
    assert [logprob for _, logprob in result.logprobs.top] == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-5)


def test_each_row_gets_as_many_logprobs_as_it_asks_for() -> None:
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    results = sample(logits.clone(), [draw(params(num_logprobs=number)) for number in (None, 0, 3, 99)])
    assert results[0].logprobs is None
    nums = [len(result.logprobs.top) for result in results if result.logprobs is not None]
    assert nums == [0, 3, 70]
    assert results[3].logprobs is not None
    assert math.fsum(math.exp(logprob) for _, logprob in results[3].logprobs.top) == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}, {"top_k": 3}])
def test_a_forbidden_token_is_never_drawn(options: dict[str, Any]) -> None:
    logits = torch.tensor([[NEVER, 0.0, NEVER, 0.0, NEVER]]).repeat(200, 1)
    assert {r.token_id for r in sample(logits, [draw(params(**options), n) for n in range(200)])} == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5, "num_logprobs": 3}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, options: dict[str, Any]) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    draws = [draw(params(**options))] * 3
    clean = sample(logits.clone(), draws)
    logits[1, 7] = bad
    mixed = sample(logits, draws)
    assert mixed[1].token_id is None
    assert "NaN or infinite" in (mixed[1].error or "")
    assert (mixed[0], mixed[2]) == (clean[0], clean[2])


def test_a_row_that_forbids_every_token_is_an_error() -> None:
    assert sample(torch.full((1, 4), NEVER), [draw(params())])[0].error


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 5, 290]),
        "top_p": st.sampled_from([0.1, 0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.sampled_from([(), ((3, 4.0), (299, -9.0))]),
        "min_tokens": st.sampled_from([0, 9]),
        "num_logprobs": st.sampled_from([None, 0, 4]),
    }
)


@given(rows=st.lists(ROWS, min_size=1, max_size=6), vocab_size=st.sampled_from([300, 4096]))
@settings(max_examples=60, deadline=None)
def test_a_row_gets_the_same_token_alone_as_in_any_batch(rows: list[dict[str, Any]], vocab_size: int) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(len(rows))) * 3
    seen = past((1, 2, 3, 3), (2, 299), stop=(0, 7))
    draws = [draw(params(**options), number, seen) for number, options in enumerate(rows)]
    together = sample(logits.clone(), draws)
    alone = [sample(logits[row : row + 1].clone(), draws[row : row + 1])[0] for row in range(len(rows))]
    assert together == alone


def test_a_draw_depends_on_seed_and_position_only() -> None:
    assert draw_for(request("a", seed=7), 0).source == draw_for(request("b", seed=7), 1).source
    assert draw_for(request("a", seed=7), 0).source != draw_for(request("a", seed=8), 0).source
    assert draw_for(request("a", position=5, seed=7), 0).source != draw_for(request("a", position=6, seed=7), 0).source


def test_a_prompt_in_one_piece_draws_as_one_in_several() -> None:
    whole = ScheduledRequest("a", (1, 2, 3), 0, (0,), needs_token=True, sampling=params(seed=3))
    rest = ScheduledRequest("a", (3,), 2, (0,), needs_token=True, sampling=params(seed=3))
    assert draw_for(whole, 0) == draw_for(rest, 0)


def test_without_a_seed_the_engines_seed_and_the_request_decide() -> None:
    assert draw_for(request("a"), 0) == draw_for(request("a"), 0)
    assert draw_for(request("a"), 0).source != draw_for(request("b"), 0).source
    assert draw_for(request("a"), 0).source != draw_for(request("a"), 1).source


@pytest.mark.parametrize("attempt", [0, 1])
def test_random_numbers_over_positions_are_uniform(attempt: int) -> None:
    draws = [draw_for(request(position=position, seed=1), 0) for position in range(1, 4001)]
    uniforms = [draw.uniform(attempt) for draw in draws]
    assert all(0 <= uniform < 1 for uniform in uniforms)
    assert uniforms != [draw.uniform(1 - attempt) for draw in draws]
    shares = Counter(int(uniform * 10) for uniform in uniforms)
    assert all(abs(shares[tenth] / 4000 - 0.1) < 0.025 for tenth in range(10))  # five standard deviations


def test_a_draw_after_a_guess_is_that_of_the_request_which_had_the_token() -> None:
    rules = {"seed": 7, "frequency_penalty": 0.5, "min_tokens": 9}
    request = ScheduledRequest("a", (1, 5, 6), 4, (0,), needs_token=True, sampling=params(**rules), num_proposed=2)
    first, *others = draws_for(msgspec.structs.replace(request, past=past((1,))), 0)
    assert first.granted == ()
    assert [draw.granted for draw in others] == [(5,), (5, 6)]
    positions = [5, 6, 7]
    assert [draw.source for draw in (first, *others)] == [
        draw_for(ScheduledRequest("b", (1,), position - 1, (0,), needs_token=True, sampling=params(seed=7)), 0).source
        for position in positions
    ]


@given(
    output=st.lists(st.integers(0, 9), max_size=4),
    granted=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    rules=st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 1.7]),
            "frequency_penalty": st.sampled_from([0.0, 0.8]),
            "presence_penalty": st.sampled_from([0.0, -0.6]),
            "min_tokens": st.integers(0, 6),
            "temperature": st.sampled_from([0.0, 1.0]),
        }
    ),
)
@settings(max_examples=60, deadline=None)
def test_what_is_granted_to_a_draw_counts_as_generated(
    output: list[int], granted: list[int], rules: dict[str, Any]
) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(len(output)))
    guessed = Draw(params(**rules), "a", past((1, 2), tuple(output), stop=(0,)), None, tuple(granted))
    came = Draw(params(**rules), "a", past((1, 2), (*output, *granted), stop=(0,)))
    assert sample(logits.clone(), [guessed]) == sample(logits.clone(), [came])


def test_each_choice_of_a_request_draws_for_itself() -> None:
    assert draw_for(request("a", seed=7), 0, choice=1) == draw_for(request("b", seed=7), 0, choice=1)
    assert len({draw_for(request("a", seed=7), 0, choice=choice).source for choice in range(3)}) == 3
