"""What each field of a chat and of a completion does, field by field: the table is as long as the bodies are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.engine.serving.conftest import EOS, FIRST_BYTE, TEMPLATE, WEATHER, with_template

from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx
    from tests.engine.serving.conftest import FakeEngine

    from octavo_engine.config import ServerConfig
    from octavo_engine.plan import SamplingParams

ANSWER: Final = "The answer is 42."
CHAT: Final = "/v1/chat/completions"
COMPLETION: Final = "/v1/completions"
USUAL: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETION: {"model": "fake", "prompt": "Hi", "max_tokens": 50},
}
NOT_THINKING: Final = b"<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Seen:
    """What came of a request."""

    response: httpx.Response
    engine: FakeEngine

    @property
    def sampling(self) -> SamplingParams:
        """What reached the engine."""
        assert self.engine.sampling is not None
        return self.engine.sampling

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Of the response."""
        return list(self.response.json()["choices"])

    @property
    def text(self) -> str:
        """Of the first choice."""
        return str(self.choices[0]["text"] if "text" in self.choices[0] else self.choices[0]["message"]["content"])


@dataclass(frozen=True)
class Field:
    """What is sent to try a field, and whether what came of it shows it; without it, that must not be so."""

    sent: dict[str, Any]
    shows: Callable[[Seen], bool]
    answer: str = ANSWER


def sampled(name: str, value: Any, becomes: Any = None, **others: Any) -> Field:
    """A field that the engine gets among the parameters of sampling."""
    expected = value if becomes is None else becomes
    return Field({name: value} | others, lambda seen: getattr(seen.sampling, name) == expected)


def tells_ids(seen: Seen) -> bool:
    """Whether the first token is written by its id."""
    return f"token_id:{FIRST_BYTE + ord('T')}" in seen.response.text


COMMON: Final[dict[str, Field]] = {
    "model": Field({"model": "other"}, lambda seen: seen.response.json()["model"] == "other"),
    "stream": Field({"stream": True}, lambda seen: "event-stream" in seen.response.headers["content-type"]),
    "stream_options": Field(
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda seen: '"choices":[],"usage":{' in seen.response.text,
    ),
    "max_tokens": sampled("max_tokens", 3),
    "temperature": sampled("temperature", 0.5),
    "top_p": sampled("top_p", 0.5),
    "top_k": sampled("top_k", 5),
    "min_p": sampled("min_p", 0.5),
    "presence_penalty": sampled("presence_penalty", 0.5),
    "frequency_penalty": sampled("frequency_penalty", -0.5),
    "repetition_penalty": sampled("repetition_penalty", 1.5),
    "logit_bias": sampled("logit_bias", {"65": 1.5}, ((65, 1.5),)),
    "n": Field({"n": 2}, lambda seen: [choice["index"] for choice in seen.choices] == [0, 1]),
    "min_tokens": sampled("min_tokens", 2),
    "seed": sampled("seed", 7),
    "stop": Field({"stop": " is"}, lambda seen: seen.text == "The answer"),
    "stop_token_ids": Field({"stop_token_ids": [FIRST_BYTE + ord("w")]}, lambda seen: seen.text == "The ans"),
    "include_stop_str_in_output": Field(
        {"stop": " is", "include_stop_str_in_output": True}, lambda seen: seen.text == "The answer is"
    ),
    "ignore_eos": sampled("ignore_eos", True, max_tokens=30),
    "skip_special_tokens": Field(
        {"skip_special_tokens": False, "include_stop_str_in_output": True, "stop_token_ids": [EOS]},
        lambda seen: seen.text == f"{ANSWER}<|im_end|>",
    ),
    "response_format": Field({"response_format": {"type": "json_object"}}, lambda seen: bool(seen.sampling.grammar)),
    "structured_outputs": Field({"structured_outputs": {"regex": "a"}}, lambda seen: bool(seen.sampling.grammar)),
    "request_id": Field({"request_id": "mine"}, lambda seen: seen.response.json()["id"].endswith("-mine")),
    "prompt_logprobs": Field({"prompt_logprobs": 1}, lambda seen: "prompt_logprobs" in seen.response.text),
}
TOOLS: Final[dict[str, Any]] = {"tools": [WEATHER]}
CHAT_FIELDS: Final[dict[str, Field]] = COMMON | {
    "messages": Field({"messages": [{"role": "user", "content": "Ho"}]}, lambda seen: b"Ho" in seen.engine.prompt),
    "tools": Field(TOOLS, lambda seen: b"get_weather" in seen.engine.prompt),
    "tool_choice": Field(TOOLS | {"tool_choice": "required"}, lambda seen: bool(seen.sampling.grammar)),
    "parallel_tool_calls": Field(TOOLS | {"parallel_tool_calls": False}, lambda seen: bool(seen.sampling.grammar)),
    "chat_template_kwargs": Field(
        {"chat_template_kwargs": {"enable_thinking": False}}, lambda seen: NOT_THINKING in seen.engine.prompt
    ),
    "reasoning_effort": Field({"reasoning_effort": "none"}, lambda seen: NOT_THINKING in seen.engine.prompt),
    "include_reasoning": Field(
        {"include_reasoning": False},
        lambda seen: seen.text == "b" and "reasoning_content" not in seen.response.text,
        "<think>a</think>b",
    ),
    "max_completion_tokens": Field({"max_completion_tokens": 3}, lambda seen: seen.text == "The"),
    "logprobs": Field({"logprobs": True}, lambda seen: bool(seen.choices[0]["logprobs"])),
    "return_tokens_as_token_ids": Field({"return_tokens_as_token_ids": True, "logprobs": True}, tells_ids),
    "top_logprobs": Field({"logprobs": True, "top_logprobs": 2}, lambda seen: seen.sampling.num_logprobs == 2),
}
COMPLETION_FIELDS: Final[dict[str, Field]] = COMMON | {
    "prompt": Field({"prompt": ["a", [70, 71]]}, lambda seen: len(seen.choices) == 2),
    "echo": Field({"echo": True}, lambda seen: seen.text == f"Hi{ANSWER}"),
    "logprobs": Field({"logprobs": 2}, lambda seen: seen.sampling.num_logprobs == 2),
    "return_tokens_as_token_ids": Field({"return_tokens_as_token_ids": True, "logprobs": 0}, tells_ids),
}
FIELDS: Final = {CHAT: CHAT_FIELDS, COMPLETION: COMPLETION_FIELDS}


@pytest.fixture
def config(fake_model_path: Path, tmp_path: Path) -> ServerConfig:
    """A server of a model that knows tools and thoughts, under two names."""
    config = with_template(fake_model_path, tmp_path, TEMPLATE)
    return replace(config, engine=replace(config.engine, served_model_names=("fake", "other")))


def test_every_field_is_in_the_table() -> None:
    elsewhere = {"priority"}  # a server of another policy: test_priority.py
    assert set(CHAT_FIELDS) == set(ChatCompletionRequest.model_fields) - elsewhere
    assert set(COMPLETION_FIELDS) == set(CompletionRequest.model_fields) - elsewhere


@pytest.mark.parametrize("path", FIELDS)
async def test_each_field_does_what_it_says_and_nothing_else_does_it(
    ready: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    for name, field in FIELDS[path].items():
        engine.answer = field.answer
        for sent, is_shown in ((field.sent, True), ({}, False)):
            response = await ready.post(path, json=USUAL[path] | sent)
            assert response.status_code == 200, (name, response.text)
            assert field.shows(Seen(response, engine)) is is_shown, (name, response.text)
