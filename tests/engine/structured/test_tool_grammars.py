"""Grammars of answers with calls: whatever is drawn within them, the parser of the format finds what was asked for.

The vocabulary is one of bytes, with the formats' marks as control tokens or not.
"""

from __future__ import annotations

import json
import random
from typing import Any, Final

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from octavo_engine.errors import RequestInvalid
from octavo_engine.structured.checker import Kind, _grammar_from
from octavo_engine.structured.compiler import Compiler
from octavo_engine.text import thoughts
from octavo_engine.text.message import MessageFormat, Parts
from octavo_engine.text.tokenizer import ControlToken, Tokenizer
from octavo_engine.text.tools import FORMATS, Tool, ToolChoice, ToolFormat, tool_format

EOS: Final = 256
MARKS: Final = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>")

WEATHER: Final = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Lyon"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "unit": {"$ref": "#/$defs/unit"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
    strict=False,
    described={},
)
TIME: Final = Tool(
    "time", {"type": "object", "properties": {}, "additionalProperties": False}, strict=True, described={}
)


def make_tokenizer(*marks: str) -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer(models.BPE(vocab={chr(byte): byte for byte in range(128)}, merges=[])),
        token_bytes=(*(bytes([byte]) for byte in range(256)), b"<eos>", *(mark.encode() for mark in marks)),
        control_tokens={text: ControlToken(EOS + place) for place, text in enumerate(("<eos>", *marks))},
        bos_id=None,
        eos_id=EOS,
        adds_bos=False,
        adds_eos=False,
        chat_template=None,
    )


PLAIN: Final = make_tokenizer()
MARKED: Final = make_tokenizer(*MARKS)
COMPILERS: Final = {tokenizer: Compiler(tokenizer, [EOS]) for tokenizer in (PLAIN, MARKED)}


def draw(grammar: str, tokenizer: Tokenizer, seed: int, *, likes: str = "") -> str:
    """A whole answer, drawn at random among what the grammar allows; `likes` is written where it can be."""
    compiled = COMPILERS[tokenizer].compile(grammar)
    chance = random.Random(seed)  # noqa: S311 - the same answers each time
    written = b""
    wanted = list(likes.encode())
    for _ in range(400):
        found = np.flatnonzero(np.unpackbits(compiled.mask(), bitorder="little")).tolist()
        allowed = [token for token in found if token >= EOS or 32 <= token < 127 or token == 10]
        if wanted and wanted[0] in allowed:
            token = wanted.pop(0)
        elif EOS in allowed and (not wanted or len(allowed) == 1):
            return written.decode()
        else:
            token = chance.choice(allowed)
        compiled.accept(token)
        written += tokenizer.token_bytes[token]
    raise AssertionError(f"it does not end: {written!r}")


def grammar_of(form: ToolFormat, tokenizer: Tokenizer, choice: ToolChoice, schema: Any = None) -> str:
    return form.grammar(choice, tokenizer.control_ids_of(form.marks), schema)


def parts_of(form: ToolFormat, choice: ToolChoice, text: str) -> Parts:
    return MessageFormat().with_tools(form, choice).parser().push(text, is_last=True)


def check_calls(parts: Parts, choice: ToolChoice) -> None:
    tools = {tool.name: tool for tool in choice.tools}
    for call in parts.calls:
        jsonschema.validate(json.loads(call.arguments), tools[call.name].parameters)


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_that_must_call_calls_and_says_nothing_else(
    form: ToolFormat, tokenizer: Tokenizer, *, parallel: bool
) -> None:
    choice = ToolChoice([WEATHER, TIME], required=True, parallel=parallel)
    grammar = grammar_of(form, tokenizer, choice)
    for seed in range(6):
        parts = parts_of(form, choice, draw(grammar, tokenizer, seed))
        assert parts.text == ""
        assert len(parts.calls) >= 1
        assert parallel or len(parts.calls) == 1
        check_calls(parts, choice)


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_an_answer_that_must_call_one_tool_calls_that_one(form: ToolFormat) -> None:
    choice = ToolChoice([TIME], required=True, parallel=False)
    parts = parts_of(form, choice, draw(grammar_of(form, PLAIN, choice), PLAIN, 0))
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == [("time", {})]


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["plain", "marked"])
def test_an_answer_that_may_call_says_anything_and_keeps_to_the_schemas_once_it_calls(
    form: ToolFormat, tokenizer: Tokenizer
) -> None:
    choice = ToolChoice([WEATHER, TIME], parallel=False)
    grammar = grammar_of(form, tokenizer, choice)
    assert draw(grammar, tokenizer, 0, likes="It is 5 < 6.").startswith("It is 5 < 6.")
    before = "Let me see. " if form.opening else ""
    if form.opening in MARKED.control_ids_of(MARKS) and tokenizer is MARKED:
        return  # the mark is not written by characters
    text = draw(grammar, tokenizer, 1, likes=before + form.opening + form.begin + form.head("get_weather"))
    parts = parts_of(form, choice, text)
    assert parts.text == before.strip()
    assert [call.name for call in parts.calls] == ["get_weather"]
    check_calls(parts, choice)


def test_an_answer_that_may_call_keeps_to_its_format_where_it_does_not() -> None:
    form = FORMATS[0]
    choice = ToolChoice([TIME])
    grammar = grammar_of(form, PLAIN, choice, {"enum": [1, 2]})
    assert {draw(grammar, PLAIN, seed, likes=likes) for seed, likes in ((0, "1"), (1, "2"))} == {"1", "2"}
    assert parts_of(form, choice, draw(grammar, PLAIN, 0, likes="<")).calls[0].name == "time"


@pytest.mark.parametrize("begun", [True, False])
def test_a_grammar_is_kept_to_after_a_thought(*, begun: bool) -> None:
    before = thoughts.grammar_before_answer({}, begun=begun)
    cases: list[tuple[Kind, str, str]] = [
        ("json_schema", '{"const": 7}', "7"),
        ("regex", "ab", "ab"),
        ("choice", '["yes"]', "yes"),
        ("grammar", 'root ::= "go"', "go"),
        ("lark", 'start: "x"', "x"),
    ]
    for kind, text, answer in cases:
        grammar = _grammar_from(kind, text, before)
        thought = "Hm, {.</think>\n" if begun else "<think>Hm, {.</think>\n"
        assert draw(grammar, PLAIN, 0, likes=thought + answer) == thought + answer
        if not begun:
            assert draw(grammar, PLAIN, 0, likes=answer) == answer


def test_an_argument_that_python_cannot_write_is_refused_by_name() -> None:
    form = next(form for form in FORMATS if form.name == "pythonic")
    tool = Tool("f", {"type": "object", "properties": {"the city": {}}}, strict=True, described={})
    with pytest.raises(RequestInvalid, match="'the city'") as error:
        grammar_of(form, PLAIN, ToolChoice([tool]))
    assert error.value.param == "tools"


def test_the_format_follows_from_the_template() -> None:
    # In the manner of the families' own templates; what is not here writes calls that are not known.
    told = {
        "hermes": "<tool_call>\n{{ tool_call | tojson }}\n</tool_call>",
        "mistral": "{{ '[TOOL_CALLS] [' }}",
        "mistral with [ARGS]": "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}",
        "llama3_json": '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}',
        "pythonic": "[func_name1(params_name1=params_value1)]",
    }
    found = {name: tool_format(template) for name, template in told.items()}
    assert {name: form.name if form else "" for name, form in found.items()} == {name: name for name in told}
    assert tool_format("{{ tools | tojson }}") is None
