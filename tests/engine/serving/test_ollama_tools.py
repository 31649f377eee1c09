"""Tools and thoughts in Ollama's API, by its own client: what reaches the prompt, and what the answers become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from ollama import AsyncClient, ResponseError
from tests.engine.serving.conftest import CALL, TEMPLATE, WEATHER, with_template

from octavo_engine.errors import ModelUnsupported
from octavo_engine.server.ollama import describe

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from tests.engine.conftest import WriteGGUF
    from tests.engine.serving.conftest import FakeEngine

    from octavo_engine.config import ServerConfig

HI: Final = [{"role": "user", "content": "Hi"}]
PARIS: Final = {"city": "Paris"}
OFF: Final = "<think>\n\n</think>\n\n"


@pytest.fixture
def template() -> str:
    """Of the model; a test may parametrize it; empty: one that knows neither tools nor thoughts."""
    return TEMPLATE


@pytest.fixture
def config(fake_model_path: Path, tmp_path: Path, template: str) -> ServerConfig:
    return with_template(fake_model_path, tmp_path, template)


def get_weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where.
    """
    return f"It rains in {city}."


async def streamed(ollama: AsyncClient, **fields: Any) -> tuple[dict[str, Any], str]:
    """Thought, text and calls of a streamed chat put together, and why it ended."""
    message: dict[str, Any] = {"thinking": "", "content": "", "tool_calls": []}
    parts = [part async for part in await ollama.chat(model="fake", messages=HI, stream=True, **fields)]
    for part in parts:
        message["thinking"] += part.message.thinking or ""
        message["content"] += part.message.content or ""
        message["tool_calls"] += [call.function for call in part.message.tool_calls or ()]
    return message, parts[-1].done_reason or ""


async def test_a_python_function_is_told_of_and_called_streamed_and_whole(
    ollama: AsyncClient, engine: FakeEngine
) -> None:
    engine.answer = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    answer = await ollama.chat(model="fake", messages=HI, tools=[get_weather])
    described = json.loads(engine.prompt.decode().split("\n")[1])
    assert described["function"]["name"] == "get_weather"
    assert described["function"]["parameters"]["properties"]["city"]["description"] == "where."
    assert (answer.message.thinking, answer.message.content, answer.done_reason) == ("Hm.", "I look.", "stop")
    assert [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()] == [
        ("get_weather", PARIS)
    ] * 2
    message, done_reason = await streamed(ollama, tools=[get_weather])
    assert (message["thinking"], message["content"], done_reason) == ("Hm.", "I look.", "stop")
    assert [(call.name, call.arguments) for call in message["tool_calls"]] == [("get_weather", PARIS)] * 2


async def test_each_call_has_an_index_and_an_id_and_comes_in_one_line(
    ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.answer = f"{CALL}\n{CALL}"
    response = await ready.post("/api/chat", json={"model": "fake", "messages": HI, "tools": [WEATHER]})
    calls = [call for line in response.text.splitlines() for call in json.loads(line)["message"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        {"index": place, "name": "get_weather", "arguments": PARIS} for place in range(2)
    ]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "arguments", ['{"city": "Par', "[1]", '"Paris"', '{"city": NaN}', '{"city": "\\ud800"}', '{"city": 1e999}']
)
async def test_a_call_without_whole_arguments_is_text(ollama: AsyncClient, engine: FakeEngine, arguments: str) -> None:
    engine.answer = f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'
    answer = await ollama.chat(model="fake", messages=HI, tools=[WEATHER])
    assert not answer.message.tool_calls
    assert "get_weather" in (answer.message.content or "")
    message, _ = await streamed(ollama, tools=[WEATHER])
    assert message["content"] == answer.message.content


async def test_calls_and_results_of_before_are_in_the_prompt(ollama: AsyncClient, engine: FakeEngine) -> None:
    engine.answer = CALL
    asked = await ollama.chat(model="fake", messages=HI, tools=[get_weather])
    engine.answer = "It rains."
    result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**PARIS)}
    answer = await ollama.chat(model="fake", messages=[*HI, asked.message, result], tools=[get_weather])
    assert answer.message.content == "It rains."
    assert f"assistant\n{CALL}" in engine.prompt.decode()
    assert "tool\nIt rains in Paris." in engine.prompt.decode()


async def test_thoughts_are_told_apart_in_both_endpoints(ollama: AsyncClient, engine: FakeEngine) -> None:
    engine.answer = "<think>\nHm.\n</think>\n\nParis"
    for think in (None, True, "low"):
        message = (await ollama.chat(model="fake", messages=HI, think=think)).message
        assert (message.thinking, message.content) == ("Hm.", "Paris")
        answer = await ollama.generate(model="fake", prompt="Hi", think=think)
        assert (answer.thinking, answer.response) == ("Hm.", "Paris")
        assert not engine.prompt.decode().endswith(OFF)
    parts = [part async for part in await ollama.generate(model="fake", prompt="Hi", stream=True)]
    assert "".join(part.thinking or "" for part in parts) == "Hm."
    assert "".join(part.response or "" for part in parts) == "Paris"
    raw = await ollama.generate(model="fake", prompt="Hi", raw=True)
    assert (raw.thinking, raw.response) == (None, engine.answer)


async def test_thinking_can_be_switched_off_and_what_is_thought_anyway_is_left_out(
    ollama: AsyncClient, engine: FakeEngine
) -> None:
    engine.answer = "<think>\nHm.\n</think>\n\nParis"
    message = (await ollama.chat(model="fake", messages=HI, think=False)).message
    assert engine.prompt.decode().endswith(OFF)
    assert (message.thinking, message.content) == (None, "Paris")
    assert (await ollama.generate(model="fake", prompt="Hi", think=False)).response == "Paris"


async def test_a_thought_of_before_is_in_the_prompt(ollama: AsyncClient, engine: FakeEngine) -> None:
    await ollama.chat(model="fake", messages=[*HI, {"role": "assistant", "content": "Yes", "thinking": "Hm."}, *HI])
    assert "<think>Hm.</think>Yes" in engine.prompt.decode()


async def test_a_format_is_kept_to_after_the_thought(ollama: AsyncClient, engine: FakeEngine) -> None:
    await ollama.chat(model="fake", messages=HI, format="json")
    assert engine.sampling is not None
    (thought, _) = json.loads(engine.sampling.grammar or "")["grammars"]
    assert thought["lark_grammar"].startswith('start: ("<think>" thought SPACE)? @answer')


async def test_a_template_of_ollamas_is_told_whether_to_think(ollama: AsyncClient, engine: FakeEngine) -> None:
    template = (
        "{{ range .Messages }}{{ .Content }}{{ end }}"
        "{{ if .IsThinkSet }}[{{ .Think }} {{ .ThinkLevel }}]{{ end }}{{ if not .Think }}</think>{{ end }}"
    )
    for think, told in ((None, "Hi[true ]"), (False, "Hi[false ]</think>"), ("high", "Hi[true high]")):
        await ollama.generate(model="fake", prompt="Hi", template=template, think=think)
        assert engine.prompt.decode() == told


@pytest.mark.parametrize(
    ("template", "capabilities"), [(TEMPLATE, ["completion", "tools", "thinking"]), ("", ["completion"])]
)
async def test_show_says_what_the_model_can_do(ollama: AsyncClient, capabilities: list[str]) -> None:
    assert (await ollama.show("fake")).capabilities == capabilities


def test_a_model_made_for_embeddings_says_that_alone(write_tiny_gguf: WriteGGUF) -> None:
    tokens = ["ĠĠ", "Ġ", *map(chr, range(0x21, 0x7F))]
    tokenizer = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [1] * 96, "merges": ["Ġ Ġ"]}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    assert describe.capabilities(write_tiny_gguf(metadata=metadata | {"llama.pooling_type": 3})) == ["embedding"]
    with pytest.raises(ModelUnsupported, match="pooling_type is 1"):
        describe.capabilities(write_tiny_gguf(metadata=metadata | {"llama.pooling_type": 1}))


@pytest.mark.parametrize("template", [""])
async def test_a_model_that_can_do_neither_says_so(ollama: AsyncClient) -> None:
    with pytest.raises(ResponseError, match="does not support tools") as caught:
        await ollama.chat(model="fake", messages=HI, tools=[get_weather])
    assert caught.value.status_code == 400
    for asked in (
        ollama.chat(model="fake", messages=HI, think=True),
        ollama.generate(model="fake", prompt="Hi", think="high"),
    ):
        with pytest.raises(ResponseError, match="does not support thinking") as caught:
            await asked
        assert caught.value.status_code == 400
    assert (await ollama.chat(model="fake", messages=HI, think=False)).message.content == "The answer is 42."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"think": "much"}, "think"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "tool_name": "f"}]}, "messages[0].tool_name"),
        (
            {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud800"}}}]}
                ]
            },
            "the text has a lone surrogate",
        ),
    ],
)
async def test_what_is_wrong_is_refused_by_name(ready: httpx.AsyncClient, fields: dict[str, Any], message: str) -> None:
    response = await ready.post("/api/chat", content=json.dumps({"model": "fake", "messages": HI} | fields))
    assert response.status_code == 400
    assert response.json()["error"].startswith(message), response.text


async def test_raw_prompts_and_thinking_do_not_go_together(ollama: AsyncClient) -> None:
    with pytest.raises(ResponseError, match="think does not go with raw: true"):
        await ollama.generate(model="fake", prompt="Hi", raw=True, think=True)
