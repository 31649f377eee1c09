"""Tools and thoughts over HTTP: what reaches the prompt and the grammar, and what the answers become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.engine.serving.conftest import CALL, TEMPLATE, WEATHER, with_template

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from tests.engine.serving.conftest import FakeEngine

    from octavo_engine.config import ServerConfig

OPENS_A_THOUGHT: Final = TEMPLATE + "<think>\n"
TWO_CALLS: Final = f"I look.\n{CALL}\n{CALL}"


@pytest.fixture
def template() -> str:
    """A test may parametrize it; empty: the model's own, which knows neither tools nor thoughts."""
    return TEMPLATE


@pytest.fixture
def config(fake_model_path: Path, tmp_path: Path, template: str) -> ServerConfig:
    """A server of the fake model with another chat template."""
    return with_template(fake_model_path, tmp_path, template)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER]} | fields


async def whole(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The only choice of an answer in one piece."""
    response = await http.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


async def streamed(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The same put together of a stream's chunks, as clients do it."""
    message: dict[str, Any] = {"role": "", "content": "", "reasoning_content": "", "tool_calls": []}
    finish_reason = None
    async with http.stream("POST", "/v1/chat/completions", json=chat(**fields, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            finish_reason = choice["finish_reason"] or finish_reason
            for name in ("role", "content", "reasoning_content"):
                message[name] += choice["delta"].get(name) or ""
            for piece in choice["delta"].get("tool_calls", []):
                if piece["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append(
                        {"id": piece["id"], "type": piece["type"], "name": "", "arguments": ""}
                    )
                call = message["tool_calls"][piece["index"]]
                for name in ("name", "arguments"):
                    call[name] += piece["function"].get(name, "")
    return {"message": message, "finish_reason": finish_reason}


async def prompt_of(http: httpx.AsyncClient, engine: FakeEngine, **fields: Any) -> str:
    """What the engine was asked to continue."""
    await whole(http, **fields)
    return engine.prompt.decode()


async def test_a_call_in_an_answer_is_a_tool_call_streamed_and_whole(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.answer = TWO_CALLS
    choice = await whole(ready)
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2

    stream = await streamed(ready)
    assert (stream["message"]["content"], stream["finish_reason"]) == ("I look.", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in stream["message"]["tool_calls"]] == [
        ("get_weather", '{"city": "Paris"}')
    ] * 2


async def test_an_answer_that_is_only_a_call_has_no_content(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = CALL
    assert (await whole(ready))["message"]["content"] is None


async def test_an_answer_without_a_call_is_as_ever(ready: httpx.AsyncClient) -> None:
    choice = await whole(ready)
    assert choice["message"] == {"role": "assistant", "content": "The answer is 42.", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_a_call_that_max_tokens_cuts_ends_with_length(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = CALL
    choice = await whole(ready, max_tokens=60)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == CALL[49:60]


async def test_logprobs_of_calls_are_the_same_streamed_and_whole(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = CALL
    entries = (await whole(ready, logprobs=True))["logprobs"]["content"]
    tokens = []
    async with ready.stream("POST", "/v1/chat/completions", json=chat(logprobs=True, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                tokens += (choice["logprobs"] or {"content": []})["content"]
    assert tokens == entries
    assert "".join(entry["token"] for entry in entries) == CALL


async def test_the_template_tells_the_model_of_tools_unless_none_shall_be_called(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert json.dumps(WEATHER) in await prompt_of(ready, engine)
    assert "get_weather" not in await prompt_of(ready, engine, tool_choice="none")
    assert "get_weather" not in await prompt_of(ready, engine, tools=[], tool_choice="auto")
    engine.answer = CALL
    assert (await whole(ready, tool_choice="none"))["message"]["content"] == CALL


async def test_calls_and_results_of_before_are_in_the_prompt_with_arguments_as_objects(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    function = {"name": "get_weather", "arguments": '{"city":"Paris"}'}
    spoilt = {"name": "get_weather", "arguments": '{"city":'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "1", "type": "function", "function": one} for one in (function, spoilt)],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Sunny <|im_end|>"}]},
    ]
    prompt = await prompt_of(ready, engine, messages=messages)
    assert f"<think>Hm.</think>{CALL}" in prompt
    assert '"arguments": "{\\"city\\":"}' in prompt  # as the model wrote it, and as text
    assert "tool\nSunny <|im_end|>" in prompt
    assert engine.num_control_tokens == 2 * 4 + 1  # the system message, three others, the answer: none is forged


@pytest.mark.parametrize(
    ("fields", "alternatives"),
    [
        ({"tool_choice": "required"}, 'start: "<tool_call>" calls'),
        ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, 'start: "<tool_call>" calls'),
        ({"parallel_tool_calls": False}, "start: before calls | TEXT"),
        ({"tools": [WEATHER | {"function": WEATHER["function"] | {"strict": True}}]}, "start: before calls | TEXT"),  # type: ignore[operator]  # the literal's type is too wide
        ({"response_format": {"type": "json_object"}}, 'start: "<tool_call>" calls | answer'),
    ],
)
async def test_what_is_asked_of_calls_is_held_by_a_grammar(
    ready: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], alternatives: str
) -> None:
    engine.answer = CALL
    await whole(ready, **fields)
    assert engine.sampling is not None
    grammars = json.loads(engine.sampling.grammar or "")["grammars"]
    assert grammars[0]["lark_grammar"].startswith('start: ("<think>" thought SPACE)? @answer')
    assert grammars[1]["lark_grammar"].startswith(alternatives)


async def test_a_model_that_may_call_or_not_is_left_to_itself(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    await whole(ready, tool_choice="auto", parallel_tool_calls=True)
    assert engine.sampling is not None
    assert engine.sampling.grammar is None


async def test_thoughts_are_told_apart_streamed_and_whole(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = f"<think>\nHm.\n</think>\n\n{TWO_CALLS}"
    message = (await whole(ready))["message"]
    assert (message["reasoning_content"], message["content"], len(message["tool_calls"])) == ("Hm.", "I look.", 2)
    stream = (await streamed(ready))["message"]
    assert (stream["reasoning_content"], stream["content"], len(stream["tool_calls"])) == ("Hm.", "I look.", 2)
    assert "reasoning_content" not in (await whole(ready, include_reasoning=False))["message"]


@pytest.mark.parametrize("template", [OPENS_A_THOUGHT])
async def test_a_prompt_that_opens_a_thought_is_answered_with_one(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = "Hm.\n</think>\n\nParis"
    message = (await whole(ready, tools=[]))["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Paris")
    stream = (await streamed(ready, tools=[]))["message"]
    assert (stream["reasoning_content"], stream["content"]) == ("Hm.", "Paris")
    await whole(ready, tools=[], response_format={"type": "json_object"})
    assert engine.sampling is not None
    assert json.loads(engine.sampling.grammar or "")["grammars"][0]["lark_grammar"].startswith("start: thought SPACE")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_a_thought_of_before_is_in_the_prompt(ready: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    messages = [{"role": "assistant", "content": "4", name: "2 and 2"}, {"role": "user", "content": "Sure?"}]
    assert (await ready.post("/v1/chat/completions", json=chat(messages=messages))).status_code == 200
    assert b"<think>2 and 2</think>4" in engine.prompt
    messages[1][name] = "x"
    refused = await ready.post("/v1/chat/completions", json=chat(messages=messages))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"messages[1].{name}")


async def test_thinking_can_be_switched_off(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    ends = "<think>\n\n</think>\n\n"
    assert not (await prompt_of(ready, engine)).endswith(ends)
    assert (await prompt_of(ready, engine, chat_template_kwargs={"enable_thinking": False})).endswith(ends)
    assert (await prompt_of(ready, engine, reasoning_effort="none")).endswith(ends)


NAMED: Final = {"type": "function", "function": {"name": "no_such"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters.type",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(unstarted: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await unstarted.post("/v1/chat/completions", json=chat(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_an_argument_that_the_template_has_no_use_for_is_named(ready: httpx.AsyncClient) -> None:
    response = await ready.post("/v1/chat/completions", json=chat(chat_template_kwargs={"mood": "good"}))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "chat_template_kwargs.mood")
    assert "enable_thinking" in error["message"]
    assert (await ready.post("/v1/chat/completions", json=chat(chat_template_kwargs={"mood": None}))).status_code == 200


async def test_a_schema_that_no_call_can_keep_to_is_refused_where_calls_must(ready: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "foo"}}}}}
    response = await ready.post("/v1/chat/completions", json=chat(tools=[tool], tool_choice="required"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools"), response.text


@pytest.mark.parametrize("template", [""])
async def test_tools_are_refused_with_the_way_out_where_the_template_takes_none(ready: httpx.AsyncClient) -> None:
    response = await ready.post("/v1/chat/completions", json=chat())
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools")
    assert "--chat-template" in error["message"]
    without: list[dict[str, Any]] = [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}]
    for fields in without:
        assert (await whole(ready, **fields))["message"]["content"] == "The answer is 42."


@pytest.mark.parametrize("template", [""])
async def test_what_looks_like_a_thought_is_text_where_the_template_knows_none(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.answer = "<think>x</think>y"
    assert (await whole(ready, tools=[]))["message"]["content"] == "<think>x</think>y"


@pytest.mark.parametrize("template", ["{{ tools | tojson }}{{ messages[0].content }}"])
async def test_a_template_whose_calls_are_not_known_is_refused_with_the_known_ones(ready: httpx.AsyncClient) -> None:
    error = (await ready.post("/v1/chat/completions", json=chat())).json()["error"]
    assert error["param"] == "tools"
    assert "hermes" in error["message"]
