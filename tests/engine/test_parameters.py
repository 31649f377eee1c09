from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.errors import RequestInvalid
from octavo_engine.parameters import NAMES, check, check_all, from_text, max_tokens_of, sampling_params, stop_strings

# Every option of Ollama's API reference and of its Python client, those of earlier releases too.
OLLAMAS = frozenset(
    "numa num_ctx num_batch num_gpu main_gpu low_vram f16_kv logits_all vocab_only use_mmap use_mlock embedding_only "  # noqa: SIM905 - easier to compare
    "num_thread num_keep seed num_predict top_k top_p min_p tfs_z typical_p repeat_last_n temperature repeat_penalty "
    "presence_penalty frequency_penalty mirostat mirostat_tau mirostat_eta penalize_newline stop "
    "draft_num_predict".split()
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5,
)


def test_every_option_of_ollama_is_known() -> None:
    assert OLLAMAS == NAMES


@settings(deadline=None)
@given(st.sampled_from(sorted(NAMES)), json_values)
def test_any_value_of_any_parameter_is_taken_or_refused_by_name(name: str, value: object) -> None:
    refusal, taken = None, {}
    try:
        taken = check(name, value)
    except RequestInvalid as error:
        refusal = error
    assert refusal is None or (refusal.param == name and str(refusal).startswith(name))
    assert sampling_params(taken, max_tokens=1).max_tokens == 1


def test_what_is_given_is_what_the_engine_gets() -> None:
    given_ = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.5, "seed": 3}
    given_ |= {"presence_penalty": 0.75, "frequency_penalty": -0.5}
    params = sampling_params(check_all(given_), max_tokens=5)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 7, 0.125)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.75, -0.5)
    assert (params.seed, params.max_tokens) == (3, 5)


def test_what_is_not_given_is_ollamas_default() -> None:
    params = sampling_params({}, max_tokens=5)
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.8, 0.9, 40, 0.0, None)
    assert not params.has_penalties


def test_values_that_mean_all_or_none() -> None:
    assert sampling_params(check_all({"top_k": -1, "seed": -1}), max_tokens=1).top_k == 0
    only = sampling_params(check_all({"top_p": 0}), max_tokens=1)
    assert (only.top_k, only.top_p) == (1, 1.0)
    assert not sampling_params(check_all({"repeat_last_n": 0, "repeat_penalty": 2}), max_tokens=1).has_penalties
    assert sampling_params(check_all({"repeat_last_n": -1, "repeat_penalty": 2}), max_tokens=1).has_penalties
    assert check_all({"typical_p": 1.0, "mirostat": 0, "num_gpu": -1, "temperature": None}) == {}


@pytest.mark.parametrize(("name", "value"), [("num_gpu", 20), ("mirostat", 2), ("num_thread", 4), ("use_mmap", True)])
def test_what_the_engine_lacks_is_refused_with_a_way_out(name: str, value: object) -> None:
    with pytest.raises(RequestInvalid, match=f"^{name} .* is not supported: ."):
        check(name, value)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RequestInvalid, match=r"no parameter 'temprature'; known: .*temperature"):
        check("temprature", 1)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("temperature", "0.5", 0.5), ("num_ctx", "128", 128), ("stop", "5", ("5",)), ("top_p", "1", 1.0)],
)
def test_text_is_read_as_a_modelfile_writes_it(name: str, text: str, value: object) -> None:
    assert check(name, from_text(name, text)) == {name: value}


def test_an_answer_takes_what_is_asked_for_or_what_the_context_leaves() -> None:
    assert max_tokens_of({}, 10, 100) == 90
    assert max_tokens_of({"num_predict": 5}, 10, 100) == 5
    assert max_tokens_of({"num_predict": 500}, 10, 100) == 90
    assert max_tokens_of({"num_ctx": 16}, 10, 100) == 6
    assert stop_strings({"stop": ("a",)}) == ("a",)


def test_a_prompt_is_never_cut() -> None:
    with pytest.raises(RequestInvalid, match="the prompt has 16 tokens, and num_ctx is 16"):
        max_tokens_of({"num_ctx": 16}, 16, 100)
    with pytest.raises(RequestInvalid, match="num_ctx is 101, and the context of this engine is 100"):
        max_tokens_of({"num_ctx": 101}, 16, 100)
