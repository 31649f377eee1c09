from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from octavo_engine.text.stop import StopStrings


def text_of(text: str, strings: list[str], cuts: list[int], *, include: bool) -> tuple[str, bool]:
    """What comes out in sum when the text comes in pieces between the cuts."""
    stop = StopStrings(strings, include=include)
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [stop.push(text[start:end]) for start, end in pairwise(borders)]
    return "".join([*pieces, stop.finish()]), stop.found


def naive(text: str, strings: list[str], *, include: bool) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, and there to the longest."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return text[:end] if include else text[: end - max(map(len, complete))], True
    return text, False


@given(
    text=st.text(st.sampled_from("abé日")),
    strings=st.lists(st.text(st.sampled_from("abé日"), min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 100)),
    include=st.booleans(),
)
@example(text="ababac", strings=["abac"], cuts=[1, 2, 3, 4, 5], include=False)
@example(text="abab", strings=["b", "abab"], cuts=[], include=False)
def test_the_text_is_the_same_however_it_comes(
    text: str, strings: list[str], cuts: list[int], *, include: bool
) -> None:
    assert text_of(text, strings, cuts, include=include) == naive(text, strings, include=include)


def test_text_that_cannot_be_a_stop_string_any_more_comes_at_once() -> None:
    stop = StopStrings(["###", "END"])
    assert stop.push("ab#") == "ab"
    assert stop.push("#E") == "##"
    assert stop.push("Nx") == "ENx"
    assert stop.push("y##") == "y"
    assert stop.finish() == "##"
    assert not stop.found


def test_nothing_comes_after_a_stop_string() -> None:
    stop = StopStrings(["END"])
    assert stop.push("abENDcd") == "ab"
    assert stop.push("ef") == ""
    assert stop.finish() == ""
