from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_bench.engines import LlamaCppDialect, NextToken, OpenAIDialect
from octavo_bench.quality import coarse_kl

VOCABULARY = 12

logits = st.lists(st.floats(-8, 8), min_size=VOCABULARY, max_size=VOCABULARY)


def log_softmax(values: list[float]) -> np.ndarray[Any, Any]:
    array = np.array(values, dtype=np.float64)
    logprobs: np.ndarray[Any, Any] = array - np.log(np.exp(array).sum())
    return logprobs


def told(logprobs: np.ndarray[Any, Any], num_top: int) -> dict[int, float]:
    return {int(token_id): float(logprobs[token_id]) for token_id in np.argsort(-logprobs)[:num_top]}


@given(logits, st.integers(1, VOCABULARY - 1))
def test_an_engine_that_equals_the_reference_has_no_divergence(values: list[float], num_top: int) -> None:
    logprobs = log_softmax(values)
    assert coarse_kl(logprobs, told(logprobs, num_top)) == pytest.approx(0, abs=1e-9)


@given(logits, logits, st.integers(1, VOCABULARY - 1))
def test_the_coarse_divergence_is_never_negative_and_never_above_the_whole_one(
    reference: list[float], engine: list[float], num_top: int
) -> None:
    p, q = log_softmax(reference), log_softmax(engine)
    whole = float((np.exp(p) * (p - q)).sum())
    assert -1e-9 <= coarse_kl(p, told(q, num_top)) <= whole + 1e-9


def test_a_wrong_token_costs_what_the_formula_says() -> None:
    reference = np.log(np.array([0.5, 0.25, 0.25]))
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert coarse_kl(reference, {0: math.log(0.8)}) == pytest.approx(expected)


def test_a_dialect_asks_about_every_token_but_the_first_and_reads_what_is_told_by_id() -> None:
    expected = NextToken(-3.0, {7: -0.5, 9: -1.5, 5: -3.0})
    openai = {"choices": [{"prompt_logprobs": [None, {str(id_): {"logprob": x} for id_, x in expected.top.items()}]}]}
    llama_cpp = {
        "completion_probabilities": [
            {"id": 5, "logprob": -3.0, "top_logprobs": [{"id": id_, "logprob": x} for id_, x in expected.top.items()]}
        ]
    }
    assert OpenAIDialect().read(openai, [5]) == [expected]
    assert LlamaCppDialect().read(llama_cpp, [5, 6]) == [expected]
    assert len(OpenAIDialect().bodies([1, 5, 6], 20)) == 1
    assert [body["prompt"] for body in LlamaCppDialect().bodies([1, 5, 6], 20)] == [[1], [1, 5]]
