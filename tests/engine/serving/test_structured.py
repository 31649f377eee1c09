"""Structured output over HTTP: what reaches the engine, and what is refused by name, in time and alone."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx
    from tests.engine.serving.conftest import FakeEngine

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]} | fields


def response_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = [
    response_format(nested(300)),
    response_format({"enum": [f"x{number}" for number in range(40_000)]}),
    response_format({"allOf": [{"type": "string", "pattern": f"a{{1,{number}}}b"} for number in range(1, 60)]}),
    {"structured_outputs": {"regex": "(((x{100}){100}){100}){100}"}},
    {"structured_outputs": {"regex": "(" * 20_000}},
    {"structured_outputs": {"grammar": "start: " + "(" * 5_000}},
    {"structured_outputs": {"grammar": "root ::= " + "(" * 5_000}},
    {"structured_outputs": {"regex": "x" * 200_001}},
]


async def test_each_way_to_ask_reaches_the_engine_on_both_routes(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    cases: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        response_format(SCHEMA),
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": "[0-9]{3}"}},
        {"structured_outputs": {"choice": ["red", "green"]}},
        {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
    ]
    seen = set()
    for fields in cases:
        answered = await ready.post("/v1/chat/completions", json=chat(**fields))
        assert answered.status_code == 200, answered.text
        assert engine.sampling is not None
        assert engine.sampling.grammar
        seen.add(engine.sampling.grammar)
        raw = await ready.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b"], "n": 2} | fields)
        assert raw.status_code == 200, raw.text
        assert engine.sampling.grammar in seen
    assert len(seen) == 6  # the same schema is the same grammar, however it is asked for

    plain = await ready.post("/v1/chat/completions", json=chat(response_format={"type": "text"}))
    assert plain.status_code == 200
    assert engine.sampling is not None
    assert engine.sampling.grammar is None


async def test_hostile_grammars_are_refused_within_a_second_and_harm_no_neighbour(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ready.post("/v1/chat/completions", json=chat(**response_format(SCHEMA)))  # the process is there
    for fields in HOSTILE:
        began = time.monotonic()
        refusing = asyncio.create_task(ready.post("/v1/chat/completions", json=chat(**fields)))
        neighbour = await ready.post("/v1/chat/completions", json=chat())
        assert neighbour.status_code == 200
        response = await refusing
        took = time.monotonic() - began
        error = response.json()["error"]
        assert response.status_code == 400, fields
        assert error["param"].split(".")[0] in fields
        assert len(response.content) < 2000
        assert took < 30, "a bound that only a check without an end exceeds on a busy machine"
    good = await ready.post("/v1/chat/completions", json=chat(**response_format(SCHEMA)))
    assert good.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        (response_format("x"), "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 5}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
async def test_what_is_wrong_is_named(unstarted: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await unstarted.post("/v1/chat/completions", json=chat(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_a_grammar_that_is_none_is_named(ready: httpx.AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (response_format({"type": "foo"}), "response_format.json_schema.schema"),
        (response_format({"$ref": "http://127.0.0.1/x"}), "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs.grammar"),
    ]
    for fields, param in cases:
        response = await ready.post("/v1/chat/completions", json=chat(**fields))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_a_client_that_leaves_while_its_grammar_is_checked_holds_up_nobody(ready: httpx.AsyncClient) -> None:
    leaving = asyncio.create_task(ready.post("/v1/chat/completions", json=chat(**HOSTILE[2])))
    await ready.get("/health")
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    good = await ready.post("/v1/chat/completions", json=chat(**response_format(SCHEMA)))
    assert good.status_code == 200
