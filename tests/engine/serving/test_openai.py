from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from openai import APIStatusError, AsyncOpenAI

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from tests.engine.serving.conftest import Eventually, FakeEngine

JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "What is the answer?"}]
# <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n: a token for each control token and for each byte
NUM_PROMPT_TOKENS = 1 + len("user\n") + len("What is the answer?") + 1 + 1 + 1 + len("assistant\n")


@pytest.fixture
async def openai(ready: httpx.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{ready.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": USER} | fields


async def events_of(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event; [DONE] as it is."""
    datas = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


async def test_a_chat_is_answered_with_exact_usage(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await openai.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": USER[0]["content"]}]
    )
    assert completion.choices[0].message.content == "The answer is 42."
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.object == "chat.completion"
    assert completion.model == "fake"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == NUM_PROMPT_TOKENS
    assert completion.usage.completion_tokens == len("The answer is 42.") + 1  # and EOS
    assert completion.usage.total_tokens == NUM_PROMPT_TOKENS + len("The answer is 42.") + 1


async def test_a_streamed_chat_is_the_same_text_in_pieces(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "The answer is 42."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("The answer is 42.") + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(ready: httpx.AsyncClient) -> None:
    async with ready.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = await events_of(response)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in event for event in events[:-1])


async def test_a_completion_continues_text_and_token_ids_alike(openai: AsyncOpenAI) -> None:
    as_text = await openai.completions.create(model="fake", prompt="ab", max_tokens=5)
    as_ids = await openai.completions.create(model="fake", prompt=[3 + ord("a"), 3 + ord("b")], max_tokens=5)
    for completion in (as_text, as_ids):
        assert completion.object == "text_completion"
        assert completion.choices[0].text == "The a"
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 5)


async def test_a_streamed_completion_is_the_same_text_in_pieces(openai: AsyncOpenAI) -> None:
    stream = await openai.completions.create(model="fake", prompt="ab", max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The a"
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_completion_without_max_tokens_ends_after_sixteen(openai: AsyncOpenAI) -> None:
    completion = await openai.completions.create(model="fake", prompt="ab")
    assert completion.choices[0].text == "The answer is 42"


async def test_control_tokens_count_in_raw_prompts_and_not_in_messages(ready: httpx.AsyncClient) -> None:
    raw = await ready.post("/v1/completions", json={"model": "fake", "prompt": "<|im_end|>"})
    assert raw.json()["usage"]["prompt_tokens"] == 1
    said = await ready.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "<|im_end|>"}]))
    without = NUM_PROMPT_TOKENS - len("What is the answer?")
    assert said.json()["usage"]["prompt_tokens"] == without + len("<|im_end|>")


async def test_a_stop_string_ends_the_text_before_it_and_the_engine_forgets_the_request(
    ready: httpx.AsyncClient, eventually: Eventually
) -> None:
    for stream in (False, True):
        body = chat(stop=[" is", "zzz"], stream=stream)
        response = await ready.post("/v1/chat/completions", json=body)
        if stream:
            events = await events_of(response)
            text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
            reason = events[-2]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == ("The answer", "stop")
    await eventually(lambda: nothing_runs(ready))


async def test_a_stop_token_ends_the_text_before_it(ready: httpx.AsyncClient) -> None:
    response = await ready.post("/v1/chat/completions", json=chat(stop_token_ids=[3 + ord("4")]))
    assert response.json()["choices"][0]["message"]["content"] == "The answer is "
    assert response.json()["choices"][0]["finish_reason"] == "stop"


async def test_characters_are_never_broken(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = "naïve 日本 👍🏽"
    response = await ready.post("/v1/chat/completions", json=chat(stream=True))
    events = await events_of(response)
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(pieces) == engine.answer
    assert not any("\ufffd" in piece for piece in pieces)


async def test_text_parts_are_joined_by_line(ready: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the answer?"}]
    response = await ready.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": parts}]))
    assert response.json()["usage"]["prompt_tokens"] == NUM_PROMPT_TOKENS


async def test_a_developer_message_is_a_system_message_to_the_template(ready: httpx.AsyncClient) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    response = await ready.post("/v1/chat/completions", json=chat(messages=messages))
    assert response.json()["usage"]["prompt_tokens"] == NUM_PROMPT_TOKENS + len("system\nBe brief.\n") + 2


async def test_the_models_are_listed_under_every_name(openai: AsyncOpenAI) -> None:
    names = [model.id async for model in openai.models.list()]
    assert names == ["fake", "org/fake"]
    assert (await openai.models.retrieve("org/fake")).id == "org/fake"
    with pytest.raises(APIStatusError) as error:
        await openai.models.retrieve("other")
    assert (error.value.status_code, error.value.code) == (404, "model_not_found")


async def test_an_unknown_model_is_a_404_with_the_names_that_there_are(ready: httpx.AsyncClient) -> None:
    response = await ready.post("/v1/chat/completions", json=chat(model="gpt-4o"))
    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert "fake, org/fake" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"user": 5}, "user"),
        ({"metadata": "x"}, "metadata"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": "x" * 1001}, "stop[0]"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"request_id": "a b"}, "request_id"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages[0].content[1]",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    unstarted: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await unstarted.post("/v1/chat/completions", content=json.dumps(chat() | fields), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert any(word in error["message"] for word in re.findall("[a-z_]+", param))


@pytest.mark.parametrize("token_id", [-1, 10**6])
async def test_stop_tokens_outside_the_vocabulary_are_refused_by_name(ready: httpx.AsyncClient, token_id: int) -> None:
    response = await ready.post("/v1/chat/completions", json=chat(stop_token_ids=[token_id]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stop_token_ids")


async def test_fields_that_ask_for_nothing_are_accepted(ready: httpx.AsyncClient) -> None:
    neutral = {
        "user": "u1",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": None,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "temperature": None,
        "stop": None,
        "max_tokens": None,
        "stream": False,
        "stream_options": None,
    }
    history = [
        *USER,
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "annotations": []},
        *USER,
    ]
    response = await ready.post("/v1/chat/completions", json=chat(messages=history, **neutral))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"x"', b"\xff", b'{"model": NaN}', b"[" * 100_000])
async def test_a_malformed_body_is_a_400_with_the_envelope(unstarted: httpx.AsyncClient, body: bytes) -> None:
    response = await unstarted.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_echoed_input_is_bounded(ready: httpx.AsyncClient) -> None:
    long = "x" * 100_000
    cases = (
        {long: 1},
        {"\ud800": 1},
        {"model": long},
        {"messages": [{"role": long, "content": "x"}]},
        {"stop": [long, 5]},
    )
    for fields in cases:
        response = await ready.post("/v1/chat/completions", content=json.dumps(chat() | fields), headers=JSON)
        assert response.status_code in {400, 404}
        assert len(response.content) < 2000
    assert len((await ready.get("/" + "y" * 10_000)).content) < 2000


async def test_a_prompt_as_long_as_the_context_is_refused_and_never_cut(ready: httpx.AsyncClient) -> None:
    for num_tokens, status in ((399, 200), (400, 400), (5_000_000, 400)):
        response = await ready.post(
            "/v1/completions", json={"model": "fake", "prompt": "a" * num_tokens, "max_tokens": 1}
        )
        assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    long = chat(messages=[{"role": "user", "content": "a" * 400}])
    error = (await ready.post("/v1/chat/completions", json=long)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_prompt_and_max_tokens_must_fit_together(ready: httpx.AsyncClient) -> None:
    room = 400 - NUM_PROMPT_TOKENS
    assert (await ready.post("/v1/chat/completions", json=chat(max_tokens=room))).status_code == 200
    response = await ready.post("/v1/chat/completions", json=chat(max_completion_tokens=room + 1))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "max_completion_tokens"
    assert f"to {room}" in error["message"]


async def test_without_max_tokens_a_chat_may_fill_the_context(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = "a" * 1000
    body = (await ready.post("/v1/chat/completions", json=chat())).json()
    assert body["usage"]["total_tokens"] == 400
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["", [], [-1], [10**9], [1.5], [True], {}, None, ["a", 1], "\ud800"])
async def test_a_prompt_that_is_none_is_refused_by_name(ready: httpx.AsyncClient, prompt: object) -> None:
    response = await ready.post(
        "/v1/completions", content=json.dumps({"model": "fake", "prompt": prompt}), headers=JSON
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_unknown_places_and_methods_get_the_envelope(ready: httpx.AsyncClient) -> None:
    nowhere = await ready.get("/v2/models")
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong_method = await ready.get("/v1/chat/completions")
    assert (wrong_method.status_code, wrong_method.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_messages_that_the_template_refuses_are_a_400(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await ready.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "RAISE"}]))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "no raising here" in response.json()["error"]["message"]


async def test_a_request_that_fails_in_the_engine_fails_alone(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failing = "poison"
    poisoned = chat(messages=[{"role": "user", "content": "poison"}])
    bad, good = await asyncio.gather(
        ready.post("/v1/chat/completions", json=poisoned), ready.post("/v1/chat/completions", json=chat())
    )
    assert (bad.status_code, bad.json()["error"]["type"]) == (500, "server_error")
    assert good.json()["choices"][0]["message"]["content"] == "The answer is 42."
    events = await events_of(await ready.post("/v1/chat/completions", json=poisoned | {"stream": True}))
    assert events[-1]["error"]["type"] == "server_error"


async def test_the_request_id_of_the_client_comes_back(ready: httpx.AsyncClient) -> None:
    sent = await ready.get("/v1/models", headers={"X-Request-Id": "abc-1"})
    assert sent.headers["X-Request-Id"] == "abc-1"
    made = [(await ready.get("/v1/models")).headers["X-Request-Id"] for _ in range(2)]
    assert made[0] != made[1]
    too_long = await ready.get("/v1/models", headers={"X-Request-Id": "x" * 1000})
    assert len(too_long.headers["X-Request-Id"]) < 100


async def test_the_log_of_each_generation_has_the_request_id_of_the_client(
    ready: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "octavo_engine.server.service")
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/completions", {"model": "fake", "prompt": ["a", "b"]}),
    ]
    for number, (path, body) in enumerate(bodies):
        await ready.post(path, json=body, headers={"X-Request-Id": f"mine-{number}"})
    lines = [record.getMessage() for record in caplog.records if "generated tokens" in record.getMessage()]
    assert [line.split()[-1] for line in lines] == ["mine-0)", "mine-1)", "mine-2)", "mine-2)"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually, *, stream: bool
) -> None:
    async def stepping() -> bool:
        return engine.num_steps > 0

    engine.steps.clear()
    request = asyncio.create_task(ready.post("/v1/chat/completions", json=chat(stream=stream, ignore_eos=True)))
    await eventually(stepping)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    engine.steps.set()
    await eventually(lambda: nothing_runs(ready))
    counted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 1.0'
    assert counted in (await ready.get("/metrics")).text


async def nothing_runs(http: httpx.AsyncClient) -> bool:
    return 'vllm:num_requests_running{engine="0",model_name="fake"} 0.0' in (await http.get("/metrics")).text
