"""The body of OpenAI's POST /v1/responses, as the chat request that it stands for. Nothing is stored here.

Every field works, is accepted where it asks for nothing, or is refused by name: docs/api.md has the list. Source of
fields, items and their meanings: OpenAI's API reference, "Responses".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.server.body import (
    Neutral,
    Strict,
    Text,
    describing,
    of_kind,
    only,
    refuse_surrogates,
    without_neutral,
)
from octavo_engine.server.openai.protocol import ChatCompletionRequest
from octavo_engine.server.openai.structured import JsonSchema
from octavo_engine.server.openai.tools import MAX_TOOLS, FunctionDefinition, ToolName

_STATELESS: Final = "nothing is stored here: send the whole conversation as input"

NEUTRAL_FIELDS: Final[Mapping[str, Neutral]] = {
    "access_programs": only(),
    "background": only(False, instead=_STATELESS),
    "context_management": only([]),
    "conversation": only(instead=_STATELESS),
    "image": only(),
    "include": only([]),
    "max_tool_calls": only(instead="no tools are run here"),
    "metadata": of_kind(dict),
    "moderation": only(),
    "previous_response_id": only(instead=_STATELESS),
    "prompt": only(instead="write the prompt as input"),
    "prompt_cache_key": of_kind(str),
    "prompt_cache_options": only(),
    "prompt_cache_retention": of_kind(str),
    "safety_identifier": of_kind(str),
    "service_tier": only("auto", "default"),
    "store": only(False, instead=_STATELESS),
    "top_logprobs": only(0, instead="chat completions tell logprobs"),
    "truncation": only("disabled", instead="nothing is ever cut from a prompt here: shorten it yourself"),
    "user": of_kind(str),
}
# What items bring along that says nothing to a model.
_IGNORED: Final = frozenset({"annotations", "encrypted_content", "id", "logprobs", "phase", "status", "summary"})


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, tool: object) -> object:
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise RequestInvalid("only functions are supported as tools", param="type")
        return tool


class NamedFunction(Strict):
    """A function that shall be called."""

    type: Literal["function"]
    name: ToolName


class TextFormat(JsonSchema):
    """A schema that the answer keeps to."""

    type: Literal["json_schema"]


class PlainFormat(Strict):
    """Text, or JSON of any object."""

    type: Literal["text", "json_object"]


class TextOptions(Strict):
    """What the text of the answer is like."""

    format: Annotated[TextFormat | PlainFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """Whether the model shall think."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Strict):
    """What a stream carries besides its events."""

    include_obfuscation: Literal[False] | None = None


_INPUT: Final = {"type": ["string", "array"], "items": {"type": "object"}, "minItems": 1}


def _as_messages(given: object) -> list[dict[str, Any]]:
    """Return the items of an input as messages of a chat."""
    if isinstance(given, str):
        return [{"role": "user", "content": refuse_surrogates(given)}]
    if not isinstance(given, list) or not given:
        raise RequestInvalid("it must be a text, or a list of items that is not empty")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        try:
            _add(messages, item)
        except RequestInvalid as error:
            raise RequestInvalid(
                str(error), param=f"[{index}].{error.param}" if error.param else f"[{index}]"
            ) from None
    return messages


def _add(messages: list[dict[str, Any]], item: object) -> None:
    """Add an item. What the model thought, said and called in one turn is one message."""
    if not isinstance(item, dict):
        raise RequestInvalid("an item is an object")
    kind = item.get("type", "message")
    own = {"message": {"role", "content"}, "function_call": {"call_id", "name", "arguments"}}
    own |= {"function_call_output": {"call_id", "output"}, "reasoning": {"content"}}
    if kind not in own:
        raise RequestInvalid(f"{str(kind)[:50]!r} is not supported, only {', '.join(own)} are", param="type")
    if unknown := item.keys() - own[kind] - _IGNORED - {"type"}:
        name = min(map(str, unknown))[:50]
        raise RequestInvalid(f"{name} is not a field that this server knows", param=name)
    if kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": _text(item, "call_id"), "content": _parts(item, "output")})
        return
    if kind == "message" and item.get("role") != "assistant":
        if item.get("role") not in {"user", "system", "developer"}:
            raise RequestInvalid("it must be user, assistant, system or developer", param="role")
        messages.append({"role": item["role"], "content": _parts(item, "content")})
        return
    turn: dict[str, Any] = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
    if not turn or (kind != "function_call" and ("tool_calls" in turn or turn["content"] is not None)):
        turn = {"role": "assistant", "content": None}
        messages.append(turn)
    if kind == "message":
        turn["content"] = _parts(item, "content")
    elif kind == "reasoning":
        turn["reasoning_content"] = _parts(item, "content") if item.get("content") else ""
    else:
        function = {"name": _text(item, "name"), "arguments": _text(item, "arguments")}
        turn.setdefault("tool_calls", []).append(
            {"id": _text(item, "call_id"), "type": "function", "function": function}
        )


def _text(item: Mapping[str, Any], name: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestInvalid("it must be a text", param=name)
    return refuse_surrogates(item[name])


def _parts(item: Mapping[str, Any], name: str) -> str:
    """A text, or the lines of a list of texts."""
    if not isinstance(item.get(name), list):
        return _text(item, name)
    texts = []
    for index, part in enumerate(item[name]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in {"input_text", "output_text", "reasoning_text", "text"} or part.keys() - _IGNORED - {
            "type",
            "text",
        }:
            raise RequestInvalid("only parts with text are supported", param=f"{name}[{index}]")
        texts.append(_text(part, "text"))
    return "\n".join(texts)


class ResponsesRequest(Strict):
    """The body of POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_FIELDS))

    model: str
    input: Annotated[Any, AfterValidator(_as_messages), WithJsonSchema(_INPUT)]  # from here on messages of a chat
    instructions: Text | None = None  # a system message before all others
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_FIELDS)

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        self.chat()
        return self

    def chat(self) -> ChatCompletionRequest:
        """Return the chat request that it stands for.

        Raises:
            RequestInvalid: there is none; what is wrong is named as in a chat request.
        """
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *self.input],
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools is not None else None,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
        }
        if isinstance(self.tool_choice, NamedFunction):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        form = self.text.format if self.text is not None else None
        if isinstance(form, TextFormat):
            schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None:
            body["response_format"] = {"type": form.type}
        try:
            return ChatCompletionRequest.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, RequestInvalid):
                raise cause from None
            raise RequestInvalid(first["msg"]) from None


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
