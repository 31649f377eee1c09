from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from octavo_engine.text.detokenizer import Detokenizer

BYTES = [bytes([byte]) for byte in range(256)]
HIDDEN = len(BYTES)  # a control token
VOCABULARY = [*BYTES, b"<|im_end|>"]


def text_of(data: bytes | list[int], stop: list[str], cuts: list[int]) -> tuple[list[str], bool]:
    """The pieces that come out when the tokens come in updates between the cuts."""
    tokens = list(data)
    detokenizer = Detokenizer(VOCABULARY, {HIDDEN}, stop)
    borders = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    pieces = [detokenizer.push(tokens[start:end]) for start, end in pairwise(borders)]
    return [*pieces, detokenizer.finish()], detokenizer.stopped


def naive(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, and there before the longest."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


SMALL = st.text(st.sampled_from("abé日"))
STOPS = st.lists(st.text(st.sampled_from("abé日"), min_size=1, max_size=4), max_size=4)


@given(text=SMALL, stop=STOPS, cuts=st.lists(st.integers(0, 100)))
@example(text="ababac", stop=["abac"], cuts=[1, 2, 3, 4, 5])
@example(text="abab", stop=["b", "abab"], cuts=[])
def test_the_text_is_the_same_however_the_tokens_come(text: str, stop: list[str], cuts: list[int]) -> None:
    pieces, stopped = text_of(text.encode(), stop, cuts)
    assert ("".join(pieces), stopped) == naive(text, stop)


@given(data=st.binary(), cuts=st.lists(st.integers(0, 100)))
def test_any_bytes_decode_as_they_do_in_one_piece(data: bytes, cuts: list[int]) -> None:
    pieces, _ = text_of(data, [], cuts)
    assert "".join(pieces) == data.decode(errors="replace")


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_no_piece_ends_within_a_character(text: str) -> None:
    pieces, _ = text_of(text.encode(), [], list(range(200)))
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_that_cannot_be_a_stop_string_any_more_comes_at_once() -> None:
    detokenizer = Detokenizer(VOCABULARY, {HIDDEN}, ["###", "END"])
    assert detokenizer.push(b"ab#") == "ab"
    assert detokenizer.push(b"#E") == "##"
    assert detokenizer.push(b"Nx") == "ENx"
    assert detokenizer.push(b"y##") == "y"
    assert detokenizer.finish() == "##"
    assert not detokenizer.stopped


def test_nothing_comes_after_a_stop_string() -> None:
    detokenizer = Detokenizer(VOCABULARY, {HIDDEN}, ["END"])
    assert detokenizer.push(b"abENDcd") == "ab"
    assert detokenizer.push(b"ef") == ""
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("data", ["é".encode()[:1], "日".encode()[:2]])
def test_an_unfinished_character_at_the_end_is_one_replacement_character(data: bytes) -> None:
    assert "".join(text_of(data, [], [])[0]) == "\ufffd"


def test_control_tokens_are_no_text() -> None:
    assert "".join(text_of([ord("a"), HIDDEN, ord("b")], ["<|"], [1])[0]) == "ab"
