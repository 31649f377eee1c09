"""POST /v1/embeddings over HTTP. The fake model's state after a prompt is its length and its last token."""

from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI

if TYPE_CHECKING:
    import httpx
    from tests.engine.serving.conftest import FakeEngine

FIRST_BYTE = 3


def expected(text: str) -> list[float]:
    state = (len(text), FIRST_BYTE + ord(text[-1]))
    return [number / math.hypot(*state) for number in state]


async def embed(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/embeddings", json={"model": "fake", "input": "abc"} | fields)


async def test_a_text_becomes_numbers_of_length_one(ready: httpx.AsyncClient) -> None:
    body = (await embed(ready)).json()
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": pytest.approx(expected("abc"), rel=1e-6)}]
    assert (body["object"], body["model"]) == ("list", "fake")
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_several_texts_and_token_ids_keep_their_order(ready: httpx.AsyncClient) -> None:
    body = (await embed(ready, input=["a", "longer", "xy"])).json()
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    for item, text in zip(body["data"], ["a", "longer", "xy"], strict=True):
        assert item["embedding"] == pytest.approx(expected(text), rel=1e-6)
    ids = (await embed(ready, input=[[FIRST_BYTE + ord("a")]])).json()
    assert ids["data"][0] == body["data"][0]


async def test_base64_holds_the_same_numbers(ready: httpx.AsyncClient) -> None:
    text = (await embed(ready, encoding_format="base64")).json()["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(text)) == pytest.approx(expected("abc"), rel=1e-6)


async def test_openais_client_reads_it(ready: httpx.AsyncClient) -> None:
    async with AsyncOpenAI(base_url=f"{ready.base_url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.embeddings.create(model="fake", input=["abc", "d"])  # asks for base64 by itself
    assert answer.data[0].embedding == pytest.approx(expected("abc"), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 64}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": "a" * 500}, "input"),
        ({"input": ["a"] * 1000}, "input"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"mood": 1}, "mood"),
    ],
)
async def test_what_is_wrong_is_named(ready: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await embed(ready, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_one_text_that_fails_fails_the_request_alone(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failing = "poison"
    response = await embed(ready, input=["good", "poison"])
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    assert (await embed(ready, input="good")).status_code == 200
