"""Thoughts and calls of tools in what a model writes: what is found, and that it is the same however the text is cut.

Texts are generated: calls that are well formed, and calls that are cut or spoilt, among text with the formats' marks.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from octavo_engine.text.message import MessageFormat
from octavo_engine.text.tools import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Call = tuple[str, dict[str, Any]]

NAMES: Final = frozenset({"f", "get_weather"})
FORMAT: Final = {one.name: one for one in FORMATS}
PLAIN: Final = MessageFormat()


def form(name: str, *, thinks: bool = False, begun: bool = False) -> MessageFormat:
    return MessageFormat(thinks, begun, FORMAT[name], NAMES)


def parse(message_format: MessageFormat, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thought, text and calls, put together of the pieces that came out."""
    parser = message_format.parser()
    thought = text = ""
    calls: list[tuple[str, str]] = []
    for place, piece in enumerate(pieces):
        parts = parser.push(piece, is_last=place == len(pieces) - 1)
        thought += parts.thought
        text += parts.text
        for call in parts.calls:
            if call.name:
                assert (call.index, len(call.call_id)) == (len(calls), 9)
                calls.append((call.name, call.arguments))
            else:
                assert call.index == len(calls) - 1, "only the last call goes on"
                calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    assert parser.num_calls == len(calls)
    return thought, text, calls


def whole(message_format: MessageFormat, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    return parse(message_format, [text])


# How each family writes calls


def hermes(calls: Sequence[Call]) -> str:
    bodies = (json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def llama_json(calls: Sequence[Call]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral_with_args(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def pythonic(calls: Sequence[Call]) -> str:
    written = (
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    )
    return f"[{', '.join(written)}]"


WRITERS: Final[dict[str, Callable[[Sequence[Call]], str]]] = {
    "hermes": hermes,
    "llama3_json": llama_json,
    "mistral": mistral,
    "mistral with [ARGS]": mistral_with_args,
    "pythonic": pythonic,
}
ANYWHERE: Final = {"hermes", "mistral", "mistral with [ARGS]"}  # text may come before a call

TRICKY: Final = [
    *("<", "[", "{", "}", "]", '"', "\\", "'", "(", ")", ",", ":", ";", " ", "\n", "x", "é", "😀"),
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>"),
    *('{"name": "f"', '"arguments": ', '"parameters": {"a": "', "f(", "[f(a='"),
]
noise = st.lists(st.sampled_from(TRICKY), max_size=12).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | noise,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(noise, inner, max_size=2),
    max_leaves=4,
)
calls_of_tools = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.sampled_from(["a", "b"]), values, max_size=2)),
    min_size=1,
    max_size=3,
)


@st.composite
def spoilt(draw: st.DrawFn, written: str) -> str:
    """A text with a part cut out of it or put into it."""
    begin, end = sorted(draw(st.tuples(st.integers(0, len(written)), st.integers(0, len(written)))))
    return written[:begin] + draw(noise) + draw(st.sampled_from(["", written[end:]]))


@st.composite
def answers(draw: st.DrawFn, name: str) -> str:
    """What a model may write: text, calls, and calls that went wrong."""
    written = calls_of_tools.map(WRITERS[name])
    parts = draw(st.lists(noise | written | written.flatmap(spoilt), max_size=4))
    return "".join(parts)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """The text in pieces, some of them empty."""
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[begin:end] for begin, end in zip([0, *borders], [*borders, len(text)], strict=True)]


@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data(), thinks=st.booleans(), begun=st.booleans())
def test_what_comes_out_does_not_depend_on_where_the_text_was_cut(
    name: str, data: st.DataObject, *, thinks: bool, begun: bool
) -> None:
    text = data.draw(answers(name))
    message_format = form(name, thinks=thinks, begun=thinks and begun)
    assert parse(message_format, data.draw(cut(text))) == whole(message_format, text)
    assert parse(message_format, [*text, ""]) == whole(message_format, text)


@pytest.mark.parametrize("name", WRITERS)
@given(calls=calls_of_tools, text=st.sampled_from(["", "Let me see.", "a < b [1] {2}"]))
def test_every_call_is_found_with_its_arguments(name: str, calls: list[Call], text: str) -> None:
    text = text if name in ANYWHERE else ""
    _, said, found = whole(form(name), f"{text}\n" * bool(text) + WRITERS[name](calls))
    assert said == text
    assert [(called, json.loads(arguments)) for called, arguments in found] == calls


@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_text_without_a_call_is_not_touched(name: str, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from('ab <[{}]>"\n(:,;')))
    assert whole(form(name), text) == ("", text, [])


@given(text=answers("hermes"))
def test_a_format_without_anything_finds_text(text: str) -> None:
    assert whole(PLAIN, text) == ("", text, [])


CASES: Final[list[tuple[str, str, str, list[tuple[str, str]]]]] = [
    # What is broken after a call has begun is passed on as its arguments, as far as they are JSON.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call>!', "}}!", [("f", '{"a": [1')]),
    # What never became one is text.
    ("hermes", '<tool_call>{"nam": "f"}</tool_call>', '<tool_call>{"nam": "f"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("llama3_json", '{"name": "Paris", "population": 3}', '{"name": "Paris", "population": 3}', []),
    ("llama3_json", 'See {"name": "f", "parameters": {}}', 'See {"name": "f", "parameters": {}}', []),
    ("mistral", "[TOOL_CALLS] of the wild", "[TOOL_CALLS] of the wild", []),
    ("pythonic", "[f(a=1), g(b=2)]", ", g(b=2)]", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
    # Ways in which models vary.
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "new", "arguments": {}}</tool_call> So.', "So.", [("new", "{}")]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("llama3_json", '{"name": "f", "arguments": {}}\n{"name": "f"}', "", [("f", "{}"), ("f", "{}")]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {}, "id": "123456789"}', "", [("f", "{}")]),
    ("mistral with [ARGS]", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    ("mistral with [ARGS]", '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a={'b': [true, None, -1.5]})]", "", [("f", '{"a": {"b": [true, null, -1.5]}}')]),
]


@pytest.mark.parametrize(("name", "text", "said", "calls"), CASES)
def test_cases(name: str, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert whole(form(name), text) == ("", said, calls)


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = form("hermes").parser()
    parser.push('<tool_call>{"name": "f", "arguments": {"a": "')
    assert [call.arguments for call in parser.push("long text").calls] == ["long text"]


@pytest.mark.parametrize(
    ("begun", "text", "thought", "said"),
    [
        (False, "<think>\nHm.\n</think>\n\nParis", "Hm.", "Paris"),
        (True, "\nHm.\n</think>\n\nParis", "Hm.", "Paris"),
        (True, "<think>\nHm.</think>Paris", "Hm.", "Paris"),
        (True, "</think>Paris", "", "Paris"),
        (False, "<think></think>Paris", "", "Paris"),
        (True, "Hm. </thi", "Hm. </thi", ""),
        (False, "Paris <think>x</think>", "", "Paris <think>x</think>"),
        (False, " <thinker", "", " <thinker"),
    ],
)
def test_a_thought_comes_first_between_tags(begun: bool, text: str, thought: str, said: str) -> None:  # noqa: FBT001 - a parameter of the test
    assert whole(MessageFormat(thinks=True, thought_begun=begun), text) == (thought, said, [])


@example("<think>a</think>b", [])
@given(noise, st.lists(st.integers(0, 40)))
def test_thoughts_do_not_depend_on_where_the_text_was_cut(text: str, borders: list[int]) -> None:
    places = [0, *sorted(min(place, len(text)) for place in borders), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(places)]
    for begun in (True, False):
        message_format = MessageFormat(thinks=True, thought_begun=begun)
        assert parse(message_format, pieces) == whole(message_format, text)


def test_a_call_in_a_thought_is_a_part_of_the_thought() -> None:
    thought, said, calls = whole(form("hermes", thinks=True), f"<think>{hermes([('f', {})])}</think>Paris")
    assert (thought, said, calls) == (hermes([("f", {})]), "Paris", [])


def test_thoughts_can_be_left_out() -> None:
    assert whole(MessageFormat(thinks=True, tells_thoughts=False), "<think>Hm.</think>Paris") == ("", "Paris", [])
