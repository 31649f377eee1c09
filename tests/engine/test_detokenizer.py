from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.text.detokenizer import Detokenizer

BYTES = [bytes([byte]) for byte in range(256)]
HIDDEN = len(BYTES)  # a control token
VOCABULARY = [*BYTES, b"<|im_end|>"]


def text_of(data: bytes | list[int], cuts: list[int]) -> list[str]:
    """The pieces that come out when the tokens come in updates between the cuts."""
    tokens = list(data)
    detokenizer = Detokenizer(VOCABULARY, {HIDDEN})
    borders = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    return [*(detokenizer.push(tokens[start:end]) for start, end in pairwise(borders)), detokenizer.finish()]


@given(data=st.binary(), cuts=st.lists(st.integers(0, 100)))
def test_any_bytes_decode_as_they_do_in_one_piece(data: bytes, cuts: list[int]) -> None:
    assert "".join(text_of(data, cuts)) == data.decode(errors="replace")


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_no_piece_ends_within_a_character(text: str) -> None:
    assert not any("\ufffd" in piece for piece in text_of(text.encode(), list(range(200))))


@pytest.mark.parametrize("data", ["é".encode()[:1], "日".encode()[:2]])
def test_an_unfinished_character_at_the_end_is_one_replacement_character(data: bytes) -> None:
    assert "".join(text_of(data, [])) == "\ufffd"


def test_control_tokens_are_no_text() -> None:
    assert "".join(text_of([ord("a"), HIDDEN, ord("b")], [1])) == "ab"
