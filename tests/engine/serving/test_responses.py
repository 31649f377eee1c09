"""POST /v1/responses over HTTP, read by OpenAI's client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from openai import AsyncOpenAI
from openai.types.responses import response_create_params
from pydantic import BaseModel

from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.server.openai.responses_protocol import NEUTRAL_FIELDS, ResponsesRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx
    from tests.engine.serving.conftest import FakeEngine

TEMPLATE: Final = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant"
)
CALL: Final = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: Final = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def config(fake_model_path: Path, tmp_path: Path) -> ServerConfig:
    """A server of the fake model with a template that knows tools and thoughts."""
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    engine = EngineConfig(
        model=fake_model_path, served_model_names=("fake",), max_model_len=4000, enable_prefix_caching=False
    )
    return ServerConfig(engine=engine, chat_template=path)


@pytest.fixture
async def client(ready: httpx.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own."""
    async with AsyncOpenAI(base_url=f"{ready.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_text_is_answered_with_a_message(client: AsyncOpenAI, engine: FakeEngine) -> None:
    response = await client.responses.create(model="fake", input="Hi", instructions="Be brief.")
    assert (response.status, response.output_text) == ("completed", "The answer is 42.")
    assert [item.type for item in response.output] == ["message"]
    assert engine.prompt == (
        b"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
    )
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (len(engine.prompt_token_ids), 18)
    assert usage.output_tokens_details.reasoning_tokens == 0


async def test_a_stream_is_the_same_in_sum_and_its_events_are_in_order(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = f"<think>Hm.</think>I look.\n{CALL}\n{CALL}"
    fields: dict[str, Any] = {"model": "fake", "input": "Weather?", "tools": [WEATHER]}
    whole = await client.responses.create(**fields)
    async with client.responses.stream(**fields) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()

    def items(response: Any) -> list[dict[str, Any]]:
        return [item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in response.output]

    for item in (*whole.output, *final.output):
        assert item.status == "completed"
    assert [item["type"] for item in items(whole)] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["arguments"] for item in items(whole)[2:]] == ['{"city": "Paris"}'] * 2
    assert whole.output_text == final.output_text == "I look."
    assert [item["type"] for item in items(final)] == [item["type"] for item in items(whole)]
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (text, thought) == ("I look.", "Hm.")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert arguments == '{"city": "Paris"}' * 2
    for usage in (whole.usage, final.usage):
        assert usage is not None
        assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens > 0) == (len(engine.answer) + 1, True)


async def test_items_of_before_become_the_messages_that_a_chat_has(client: AsyncOpenAI, engine: FakeEngine) -> None:
    history: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "1", "output": "Sunny."},
        {"role": "user", "content": "Thanks!"},
    ]
    await client.responses.create(model="fake", input=history)
    assert engine.prompt.decode() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>Hm.</think>I look."
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nSunny.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant"
    )


async def test_what_was_answered_can_be_sent_back_as_it_is(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = f"<think>Hm.</think>I look.\n{CALL}"
    first = await client.responses.create(model="fake", input="Weather?", tools=[WEATHER])  # type: ignore[list-item] # a plain dictionary
    call = first.output[-1]
    assert call.type == "function_call"
    history: list[Any] = [
        {"role": "user", "content": "Weather?"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
    ]
    again = await client.responses.create(model="fake", input=history)
    assert again.status == "completed"
    assert "<think>Hm.</think>I look.<tool_call>" in engine.prompt.decode()


async def test_a_schema_is_kept_to_and_read(client: AsyncOpenAI, engine: FakeEngine) -> None:
    class City(BaseModel):
        name: str

    engine.answer = '{"name": "Paris"}'
    parsed = await client.responses.parse(model="fake", input="A city?", text_format=City)
    assert parsed.output_parsed == City(name="Paris")
    assert engine.sampling is not None
    assert '"name"' in (engine.sampling.grammar or "")


async def test_an_answer_that_is_cut_is_incomplete(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="fake", input="Hi", max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "The")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_failure_after_the_start_is_an_event(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failing = "poison"
    response = await ready.post("/v1/responses", json={"model": "fake", "input": "poison", "stream": True})
    last = json.loads(response.text.strip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert (await ready.post("/v1/responses", json={"model": "fake", "input": "poison"})).status_code == 500


async def test_a_field_works_or_a_value_that_asks_for_something_is_a_400_that_names_it(
    unstarted: httpx.AsyncClient,
) -> None:
    fields = {
        *response_create_params.ResponseCreateParamsBase.__annotations__,
        *response_create_params.ResponseCreateParamsStreaming.__annotations__,
    }
    for name in sorted(fields):
        nonsense = await unstarted.post("/v1/responses", json={"model": "fake", "input": "x"} | {name: {"no": ["x"]}})
        assert nonsense.status_code == 400 or name == "metadata", name  # which takes any object
        if nonsense.status_code == 400:
            assert nonsense.json()["error"]["param"].split(".")[0].split("[")[0] == name
        null = await unstarted.post("/v1/responses", json={name: None, "model": "fake", "input": "x"})
        known = name in ResponsesRequest.model_fields or name in NEUTRAL_FIELDS
        assert null.status_code == (503 if known else 400), name  # 503: the body is good, and there is no model yet


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0].mood"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ],
)
async def test_what_is_wrong_is_named(unstarted: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await unstarted.post("/v1/responses", json={"model": "fake", "input": "x"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
