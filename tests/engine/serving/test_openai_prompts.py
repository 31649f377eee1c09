"""Several prompts in one body, echo, usage while it streams: /v1/completions through the unchanged client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from openai import APIStatusError, AsyncOpenAI

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from tests.engine.serving.conftest import Eventually, FakeEngine

FIRST_BYTE = 3  # the fake model's token of byte 0
EOS = 2
IDS = [FIRST_BYTE + byte for byte in b"xyz"]


@pytest.fixture
async def openai(ready: httpx.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{ready.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def complete(openai: AsyncOpenAI, prompt: Any, **fields: Any) -> Any:
    return await openai.completions.create(model="fake", prompt=prompt, **{"max_tokens": 5} | fields)


async def test_every_prompt_of_a_list_gets_n_choices_in_order_and_usage_counts_all(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.answers = {0: "One.", 1: "Two!!"}
    whole = await complete(openai, ["ab", "c"], n=2)
    assert [(choice.index, choice.text) for choice in whole.choices] == [
        (0, "One."),
        (1, "Two!!"),
        (2, "One."),
        (3, "Two!!"),
    ]
    assert whole.usage.prompt_tokens == 3
    assert whole.usage.completion_tokens == 2 * (5 + 5)

    chunks = [
        chunk
        async for chunk in await complete(openai, ["ab", "c"], n=2, stream=True, stream_options={"include_usage": True})
    ]
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


async def test_lists_of_token_ids_are_prompts_too(openai: AsyncOpenAI) -> None:
    assert (await complete(openai, [IDS, IDS[:1]])).usage.prompt_tokens == 4


async def test_echo_puts_the_prompt_before_each_answer(openai: AsyncOpenAI) -> None:
    whole = await complete(openai, ["ab ", "<|im_end|>"], echo=True, n=2)
    assert [choice.text for choice in whole.choices] == ["ab The a"] * 2 + ["<|im_end|>The a"] * 2
    assert (await complete(openai, [*IDS, EOS], echo=True)).choices[0].text == "xyz<|im_end|>The a"
    chunks = [chunk async for chunk in await complete(openai, ["ab ", "c "], echo=True, stream=True)]
    texts = ["".join(piece.text for c in chunks for piece in c.choices if piece.index == index) for index in (0, 1)]
    assert texts == ["ab The a", "c The a"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", "b" * 400]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "echo": 1}, "echo"),
    ],
)
async def test_what_is_wrong_in_a_body_with_prompts_is_named(
    ready: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await ready.post("/v1/completions", json={"model": "fake", "max_tokens": 1} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_prompts_that_can_never_wait_here_together_are_refused_and_named(
    ready: httpx.AsyncClient, eventually: Eventually, engine: FakeEngine
) -> None:
    most = 64 + 4 * 64  # --max-num-seqs and --max-num-queued-reqs
    too_many = await ready.post("/v1/completions", json={"model": "fake", "prompt": ["a"] * (most + 1)})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt")

    # One that waits already leaves too little room for a list of so many, of which then none is begun.
    async def num_admitted() -> int:
        load: int = (await ready.get("/load")).json()["server_load"]
        return load

    async def one_waits() -> bool:
        return await num_admitted() == 1

    async def none_waits() -> bool:
        return await num_admitted() == 0

    engine.steps.clear()
    first = asyncio.create_task(ready.post("/v1/completions", json={"model": "fake", "prompt": "a"}))
    await eventually(one_waits)
    refused = await ready.post("/v1/completions", json={"model": "fake", "prompt": ["a"] * most, "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert refused.headers["Retry-After"]
    engine.steps.set()
    assert (await first).status_code == 200
    await eventually(none_waits)


async def test_one_prompt_that_fails_fails_the_request_and_ends_the_others(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    engine.failing = "poison"
    engine.answer = "a" * 1000
    body = {"model": "fake", "prompt": ["good", "poison"], "max_tokens": 300}
    assert (await ready.post("/v1/completions", json=body)).status_code == 500

    async def nothing_runs() -> bool:
        return 'vllm:num_requests_running{engine="0",model_name="fake"} 0.0' in (await ready.get("/metrics")).text

    await eventually(nothing_runs)


async def test_usage_comes_with_every_chunk_where_that_is_asked_for(openai: AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [chunk async for chunk in await complete(openai, "ab", stream=True, stream_options=options)]
    num_characters = 0  # as many as tokens
    for chunk in chunks:
        num_characters += sum(len(piece.text) for piece in chunk.choices)
        assert chunk.usage.completion_tokens == num_characters
    assert num_characters == 5
    assert all(chunk.usage.prompt_tokens == 2 for chunk in chunks)
    only_continuous: Any = {"continuous_usage_stats": True}  # vLLM's rule: nothing without include_usage
    chunks = [chunk async for chunk in await complete(openai, "ab", stream=True, stream_options=only_continuous)]
    assert all(chunk.usage is None for chunk in chunks)


async def test_tokens_may_be_named_by_id_in_logprobs(openai: AsyncOpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    logprobs = (await complete(openai, "ab", max_tokens=2, logprobs=2, extra_body=extra)).choices[0].logprobs
    first = FIRST_BYTE + ord("T")
    assert logprobs.tokens[0] == f"token_id:{first}"
    assert set(logprobs.top_logprobs[0]) == {f"token_id:{first}", f"token_id:{first + 1}"}
    chat = await openai.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1, extra_body=extra
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None
    assert content[0].token == content[0].top_logprobs[0].token == f"token_id:{first}"
    assert content[0].bytes == [ord("T")]


async def test_control_tokens_are_shown_where_that_is_asked_for(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = ""  # EOS at once, which is shown if what ends the text is a part of it
    body = {"model": "fake", "prompt": "ab", "include_stop_str_in_output": True}
    hidden = await ready.post("/v1/completions", json=body)
    shown = await ready.post("/v1/completions", json=body | {"skip_special_tokens": False})
    texts = [response.json()["choices"][0]["text"] for response in (hidden, shown)]
    assert texts == ["", "<|im_end|>"]


async def test_the_id_of_the_request_is_in_the_responses_and_may_come_twice(openai: AsyncOpenAI) -> None:
    extra = {"request_id": "mine"}
    both = await asyncio.gather(*(complete(openai, "ab", extra_body=extra) for _ in range(2)))
    assert [completion.id for completion in both] == ["cmpl-mine"] * 2


async def test_a_list_with_a_bad_id_in_it_is_told_by_the_client(openai: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError) as error:
        await complete(openai, [IDS, [10**6]])
    assert (error.value.status_code, error.value.param) == (400, "prompt")
