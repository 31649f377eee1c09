"""Logprobs of prompts: OpenAI's echo with logprobs, and vLLM's prompt_logprobs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from tests.engine.serving.conftest import EOS, FIRST_BYTE, tokens_of

if TYPE_CHECKING:
    import httpx
    from tests.engine.serving.conftest import FakeEngine

PROMPT: Final = "ab é"
TOKENS: Final = ["a", "b", " ", "bytes:\\xc3", "bytes:\\xa9"]


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={"model": "fake", "prompt": PROMPT, "max_tokens": 2} | fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def streamed(http: httpx.AsyncClient, **fields: Any) -> dict[int, dict[str, Any]]:
    """Text and logprobs of each choice of a stream put together."""
    whole: dict[int, dict[str, Any]] = {}
    body = {"model": "fake", "prompt": PROMPT, "max_tokens": 2, "stream": True} | fields
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                one = whole.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
                one["text"] += choice["text"]
                one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
                for name, values in (choice["logprobs"] or {}).items():
                    one["logprobs"].setdefault(name, []).extend(values)
    return whole


async def test_echo_with_logprobs_tells_those_of_the_prompt_before_those_of_the_answer(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    (choice,) = (await complete(ready, echo=True, logprobs=1))["choices"]
    assert choice["text"] == f"{PROMPT}Th"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*TOKENS, "T", "h"]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * 6
    assert logprobs["top_logprobs"] == [None] + [{token: -0.5} for token in [*TOKENS, "T", "h"][1:]]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3, 4, 5]
    assert engine.sampling is not None
    assert (engine.sampling.num_prompt_logprobs, engine.sampling.num_logprobs) == (1, 1)


async def test_a_stream_tells_the_same(ready: httpx.AsyncClient) -> None:
    for fields in ({"n": 2}, {"prompt": [PROMPT, "x"]}, {"prompt": "x"}, {"max_tokens": 0}):
        whole = (await complete(ready, echo=True, logprobs=2, **fields))["choices"]
        assert await streamed(ready, echo=True, logprobs=2, **fields) == {
            choice["index"]: {name: choice[name] for name in ("text", "logprobs", "finish_reason")} for choice in whole
        }


async def test_a_prompt_alone_is_told_without_an_answer(ready: httpx.AsyncClient) -> None:
    body = await complete(ready, prompt=[*tokens_of("ab"), EOS], echo=True, logprobs=0, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab<|im_end|>", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "<|im_end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 0)
    assert (await complete(ready, echo=True, max_tokens=0))["choices"][0]["text"] == PROMPT


async def test_prompt_logprobs_are_vllms_by_token_id_with_rank_and_text(ready: httpx.AsyncClient) -> None:
    b = FIRST_BYTE + ord("b")
    expected = {
        str(b): {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        str(b + 1): {"logprob": -1.0, "rank": 2, "decoded_token": "c"},
    }
    body = await complete(ready, prompt="ab", prompt_logprobs=2, n=2)
    assert [choice["prompt_logprobs"] for choice in body["choices"]] == [[None, expected]] * 2
    body = await complete(ready, prompt="a", prompt_logprobs=0)
    assert body["choices"][0]["prompt_logprobs"] == [None]
    assert "prompt_logprobs" not in (await complete(ready, echo=True, logprobs=0))["choices"][0]

    messages = [{"role": "user", "content": "Hi"}]
    chat = await ready.post("/v1/chat/completions", json={"model": "fake", "messages": messages, "prompt_logprobs": 0})
    told = chat.json()["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == chat.json()["usage"]["prompt_tokens"]
    assert "".join(next(iter(one.values()))["decoded_token"] for one in told[1:]) == (
        "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_prompt_whose_logprobs_are_asked_for_is_computed_whole(ready: httpx.AsyncClient) -> None:
    prompt = "abcdefgh" * 4
    assert (await complete(ready, prompt=prompt))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    body = await complete(ready, prompt=prompt, prompt_logprobs=0)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(body["choices"][0]["prompt_logprobs"]) == len(prompt)
    assert (await complete(ready, prompt=prompt))["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
