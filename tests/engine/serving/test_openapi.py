"""/openapi.json: a valid document, and bodies are good by it where the server takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import pytest
from openapi_spec_validator import validate

from octavo_engine.server.app import create_app
from octavo_engine.server.openai import embeddings, fields, responses_protocol

if TYPE_CHECKING:
    import httpx

    from octavo_engine.server.service import Service

USER: Final = {"role": "user", "content": "x"}
TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT: Final[dict[str, Any]] = {"model": "fake", "messages": [USER]}
OLLAMAS_CALL: Final = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
COMPLETION: Final[dict[str, Any]] = {"model": "fake", "prompt": "x"}
EMBEDDING: Final[dict[str, Any]] = {"model": "fake", "input": "x"}
RESPONSE: Final[dict[str, Any]] = {"model": "fake", "input": "x"}

GOOD: Final[list[tuple[str, dict[str, Any]]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stop": "a", "logit_bias": {"5": 1.5}, "temperature": 0, "seed": None}),
    ("/v1/chat/completions", CHAT | {"stop": ["a", "b"], "n": 2, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    ("/v1/chat/completions", CHAT | {"messages": [USER | {"annotations": []}]}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "f"}}}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
    ("/v1/chat/completions", CHAT | {"structured_outputs": {"choice": ["a"]}}),
    ("/v1/completions", COMPLETION | {"echo": True, "best_of": 1}),
    ("/v1/completions", COMPLETION | {"prompt": ["a", [1, 2]]}),
    ("/v1/completions", COMPLETION | {"prompt": [1, 2]}),
    ("/v1/embeddings", EMBEDDING | {"encoding_format": "base64", "user": "u"}),
    ("/v1/responses", RESPONSE | {"input": [USER], "store": False, "metadata": {"a": "b"}}),
    ("/v1/responses", RESPONSE | {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [1]}),
    ("/api/chat", CHAT | {"tools": [TOOL], "think": "low", "keep_alive": "5m", "truncate": False, "stream": None}),
    ("/api/chat", CHAT | {"messages": [USER | {"images": []}, OLLAMAS_CALL, {"role": "tool", "tool_name": "f"}]}),
    ("/api/generate", COMPLETION | {"think": True, "format": {"type": "object"}, "suffix": "", "options": {"seed": 1}}),
    ("/api/embed", EMBEDDING | {"truncate": False, "keep_alive": 0}),
    ("/api/embeddings", COMPLETION | {"options": {}}),
    ("/api/show", {"name": "fake", "verbose": True}),
]
BAD: Final[list[tuple[str, dict[str, Any]]]] = [
    ("/v1/chat/completions", CHAT | {"mood": 1}),
    ("/v1/chat/completions", CHAT | {"messages": []}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "robot", "content": "x"}]}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/v1/chat/completions", CHAT | {"stop": ["a", "b", "c", "d", "e"]}),
    ("/v1/chat/completions", CHAT | {"temperature": "hot"}),
    ("/v1/chat/completions", CHAT | {"tool_choice": "any"}),
    ("/v1/chat/completions", CHAT | {"store": True}),
    ("/v1/completions", COMPLETION | {"prompt": {"a": 1}}),
    ("/v1/completions", COMPLETION | {"best_of": 2}),
    ("/v1/embeddings", EMBEDDING | {"dimensions": 5}),
    ("/v1/responses", RESPONSE | {"background": True}),
    ("/v1/responses", {"model": "fake"}),
    ("/detokenize", {"tokens": ["a"]}),
    ("/api/chat", CHAT | {"think": "much"}),
    ("/api/chat", CHAT | {"messages": [USER | {"images": ["aGk="]}]}),
    ("/api/generate", COMPLETION | {"context": [1]}),
    ("/api/embed", EMBEDDING | {"dimensions": 5}),
    ("/api/show", {"model": 1}),
]


async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await http.get("/openapi.json")).json())


def is_good(document: dict[str, Any], path: str, body: dict[str, Any]) -> bool:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    whole = schema | {"components": document["components"]}
    return jsonschema.Draft202012Validator(whole).is_valid(body)


async def test_the_document_is_valid(unstarted: httpx.AsyncClient) -> None:
    validate(await document(unstarted))


async def test_bodies_are_good_by_it_where_the_server_takes_them(unstarted: httpx.AsyncClient) -> None:
    described = await document(unstarted)
    for bodies, is_taken in ((GOOD, True), (BAD, False)):
        for path, body in bodies:
            status = (await unstarted.post(path, json=body)).status_code
            assert (status, is_good(described, path, body)) == (503 if is_taken else 400, is_taken), (path, body)


@pytest.mark.parametrize(
    ("path", "body", "neutral"),
    [
        ("/v1/chat/completions", CHAT, fields.NEUTRAL_FIELDS),
        ("/v1/completions", COMPLETION, fields.NEUTRAL_FIELDS),
        ("/v1/embeddings", EMBEDDING, embeddings.NEUTRAL_FIELDS),
        ("/v1/responses", RESPONSE, responses_protocol.NEUTRAL_FIELDS),
    ],
)
async def test_fields_that_ask_for_nothing_are_in_it(
    unstarted: httpx.AsyncClient, path: str, body: dict[str, Any], neutral: dict[str, Any]
) -> None:
    described = await document(unstarted)
    for name, field in neutral.items():
        for value in [None, *field.schema.get("enum", [])]:
            assert is_good(described, path, body | {name: value}), name
        assert not is_good(described, path, body | {name: 12345}), name


async def test_errors_and_keys_are_described_as_they_are(unstarted: httpx.AsyncClient, service: Service) -> None:
    described = await document(unstarted)
    refused = await unstarted.post("/v1/completions", json={})
    schemas = described["components"]["schemas"]
    jsonschema.validate(refused.json(), schemas["Error"])
    assert "HTTPValidationError" not in schemas
    answers = described["paths"]["/v1/completions"]["post"]["responses"]
    assert set(answers) == {"200", "400", "503"}
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    service.config = replace(service.config, api_key=("k",))
    guarded = create_app(service).openapi()
    assert guarded["paths"]["/v1/completions"]["post"]["security"]
    assert "security" not in guarded["paths"]["/health"]["get"]
