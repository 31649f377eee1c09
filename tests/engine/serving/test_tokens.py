from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx

FIRST_BYTE = 3  # the fake model's token of byte 0


async def test_a_text_is_tokenised_as_the_same_prompt_is(ready: httpx.AsyncClient) -> None:
    body = (await ready.post("/tokenize", json={"prompt": "hé<|im_end|>", "return_token_strs": True})).json()
    ids = [FIRST_BYTE + byte for byte in "hé".encode()] + [2]
    assert body == {
        "count": 4,
        "max_model_len": 400,
        "tokens": ids,
        "token_strs": ["h", "\ufffd", "\ufffd", "<|im_end|>"],
    }
    prompt = await ready.post("/v1/completions", json={"model": "fake", "prompt": "hé<|im_end|>"})
    assert prompt.json()["usage"]["prompt_tokens"] == 4


async def test_a_chat_is_tokenised_by_the_template(ready: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = (await ready.post("/tokenize", json={"model": "org/fake", "messages": messages})).json()
    chat = await ready.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
    assert body["count"] == len(body["tokens"]) == chat.json()["usage"]["prompt_tokens"]
    assert body["token_strs"] is None
    text = (await ready.post("/detokenize", json={"tokens": body["tokens"]})).json()
    assert text == {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}


async def test_a_text_longer_than_the_context_is_counted_and_a_flood_is_refused(ready: httpx.AsyncClient) -> None:
    assert (await ready.post("/tokenize", json={"prompt": "a" * 500})).json()["count"] == 500
    flood = await ready.post("/tokenize", json={"prompt": "a" * 1_000_000})
    assert (flood.status_code, flood.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_an_empty_text_has_no_tokens(ready: httpx.AsyncClient) -> None:
    assert (await ready.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await ready.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        (
            "/tokenize",
            {"messages": USER, "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "a", "mood": 1}, "mood"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(ready: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await ready.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
async def test_a_model_that_is_not_served_is_a_404(ready: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    assert (await ready.post(path, json=body | {"model": "other"})).status_code == 404


async def test_the_version_is_told(ready: httpx.AsyncClient) -> None:
    assert set((await ready.get("/version")).json()) == {"version"}
