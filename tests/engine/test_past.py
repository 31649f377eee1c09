from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.past import PastTokens
from octavo_engine.plan import SamplingParams
from octavo_engine.request import Request

TOKENS = st.lists(st.integers(0, 9), max_size=30)


@given(prompt=TOKENS, output=TOKENS)
def test_each_token_is_there_once_with_how_often_it_was_generated(prompt: list[int], output: list[int]) -> None:
    past = PastTokens(prompt, ())
    for number, token in enumerate(output):
        assert past.num_generated == number
        past.as_arrays()  # what was handed out does not hinder what comes
        past.add(token)
    ids, counts = past.as_arrays()
    assert sorted(ids) == sorted({*prompt, *output})
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == dict.fromkeys(prompt, 0) | Counter(output)


@given(prompt=TOKENS, output=TOKENS, granted=TOKENS)
def test_what_is_granted_counts_like_what_was_generated_and_leaves_no_trace(
    prompt: list[int], output: list[int], granted: list[int]
) -> None:
    past, later = PastTokens(prompt, ()), PastTokens(prompt, ())
    for token in output:
        past.add(token)
    for token in output + granted:
        later.add(token)
    before = [array.tolist() for array in past.as_arrays()]
    assert [array.tolist() for array in past.as_arrays(granted)] == [array.tolist() for array in later.as_arrays()]
    assert [array.tolist() for array in past.as_arrays()] == before


def request(num_choices: int = 1, **rules: float) -> Request:
    return Request(
        request_id="a",
        arrival=0,
        num_choices=num_choices,
        prompt_token_ids=(5, 5),
        sampling=SamplingParams(max_tokens=9, **rules),  # type: ignore[arg-type] # ints are floats here
        stop_token_ids=frozenset({2}),
        max_num_tokens=11,
    )


def test_only_a_request_whose_rules_look_back_pays_for_it() -> None:
    assert request(temperature=0.5, top_k=4).past is None
    for rules in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"min_tokens": 1}):
        assert request(**rules).past is not None


def test_each_choice_counts_its_own_tokens() -> None:
    first, second = request(num_choices=2, frequency_penalty=1.0).fork()
    first.append(7)
    assert first.past is not None
    assert second.past is not None
    assert [array.tolist() for array in first.past.as_arrays()] == [[5, 7], [0, 1]]
    assert [array.tolist() for array in second.past.as_arrays()] == [[5], [0]]
    assert second.past.stop_token_ids == (2,)
