"""The bodies of OpenAI's requests. Every field works, is accepted where it asks for nothing, or is refused by name.

What has no field here is in fields.py, or unknown. docs/api.md is the list for users.

Field names and meanings: OpenAI's API reference; top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
include_stop_str_in_output, skip_special_tokens, return_tokens_as_token_ids, request_id, ignore_eos,
priority, prompt_logprobs and continuous_usage_stats are vLLM's.
"""

from typing import Annotated, Any, Final, Literal, Self, TypeGuard

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.plan import SamplingParams
from octavo_engine.server.body import Strict, Text, describing, refuse_surrogates, without_neutral
from octavo_engine.server.openai.fields import NEUTRAL_FIELDS, NEUTRAL_MESSAGE_FIELDS
from octavo_engine.server.openai.structured import ResponseFormat, StructuredOutputs
from octavo_engine.server.openai.tools import MAX_TOOLS, ChosenTools, NamedTool, ToolCall, ToolDefinition
from octavo_engine.structured.checker import Wanted
from octavo_engine.text.template import Message
from octavo_engine.text.tools import ToolChoice

_COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's and vLLM's default for /v1/completions

_MAX_STOP_STRINGS: Final = 4  # OpenAI's limit
_MAX_STOP_CHARACTERS: Final = 1000  # of one; each new piece of text is compared with all of them
_MAX_STOP_TOKENS: Final = 256
_MAX_PROMPTS: Final = 1024
_MAX_CHOICES: Final = 128  # OpenAI's limit
_MAX_BIASED_TOKENS: Final = 1024
_MAX_TOP_LOGPROBS: Final = 20  # OpenAI's limit for chats; vLLM's for both


# Bodies may have these in several forms; here are the JSON schemas of what is taken.
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT: Final = {"type": ["string", "array", "null"], "items": _TEXT_PART}
_STOP: Final = {
    "type": ["string", "array", "null"],
    "minLength": 1,
    "maxLength": _MAX_STOP_CHARACTERS,
    "items": {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARACTERS},
    "maxItems": _MAX_STOP_STRINGS,
}
_TOKEN_IDS: Final = {"type": "array", "items": {"type": "integer"}}
_PROMPTS: Final = {
    "anyOf": [
        {"type": "string"},
        _TOKEN_IDS,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS]}, "maxItems": _MAX_PROMPTS},
    ]
}


def _joined_text(content: object) -> object:
    """A list of text parts stands for its lines (vLLM's rule)."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"of type {str(kind)[:50]!r}" if kind is not None else "without a type"
            raise RequestInvalid(f"a content part {shown} is not supported, only 'text' is", param=f"[{index}]")
        text = part.get("text")
        if not isinstance(text, str) or part.keys() - {"type", "text"}:
            raise RequestInvalid("a text part has exactly the fields type and text, a string", param=f"[{index}]")
        texts.append(text)
    return "\n".join(texts)


class ChatMessage(Strict):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_MESSAGE_FIELDS))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(_joined_text), WithJsonSchema(_CONTENT)] = None
    name: Text | None = None  # for templates that show it
    reasoning_content: Text | None = None  # what the model thought before an answer of before
    reasoning: Text | None = None  # the same under vLLM's newer name
    tool_calls: list[ToolCall] | None = None  # that the model made
    tool_call_id: Text | None = None  # of the call that the content is the result of

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_MESSAGE_FIELDS)

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        roles = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant"}
        for name, role in (roles | {"tool_call_id": "tool"}).items():
            if getattr(self, name) and self.role != role:
                raise RequestInvalid(f"only messages of the role {role} have it", param=name)
        if self.content is None and not self.tool_calls:
            raise RequestInvalid("a message without tool_calls has content", param="content")
        return self

    def for_template(self) -> Message:
        """Return the message as templates know it, where `developer` is called `system`."""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        given = {"name": self.name, "reasoning_content": thought, "tool_call_id": self.tool_call_id}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: every chunk tells the usage so far


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _token_id(key: object) -> object:
    """JSON's keys are strings, so a token id comes as its digits."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    raise RequestInvalid(f"the key {str(key)[:20]!r} is not a token id")


_StopString = Annotated[Text, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _GenerationBody(Strict):
    """What both endpoints have in common."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_FIELDS))

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[int, BeforeValidator(_token_id)], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=_MAX_BIASED_TOKENS),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower goes first
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[_StopString], Field(max_length=_MAX_STOP_STRINGS)] | None,
        BeforeValidator(_as_list),
        WithJsonSchema(_STOP),
    ] = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None  # False: control tokens are part of the text
    return_tokens_as_token_ids: bool | None = None  # in logprobs, tokens are written as token_id:ID
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None  # a part of the response's id
    prompt_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None  # as many likely tokens; no stream

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, {n: field for n, field in NEUTRAL_FIELDS.items() if n not in cls.model_fields})

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestInvalid("stream_options needs stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestInvalid("streams do not tell it; leave out stream", param="prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_structure(self) -> Self:
        if self.wanted_output is not None:
            param = "response_format" if self.structured_outputs is None else "structured_outputs"
            if self.structured_outputs is not None and self.response_format is not None:
                raise RequestInvalid("give response_format or structured_outputs, not both", param=param)
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    raise RequestInvalid(f"{param} says when the answer ends; leave out {name}", param=name)
        return self

    @property
    def wanted_output(self) -> Wanted | None:
        """What the answers keep to; None: nothing."""
        if self.structured_outputs is not None:
            return self.structured_outputs.wanted()
        return self.response_format.wanted() if self.response_format is not None else None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of the stream tells the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell with the logprob of each token; None: no logprobs at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def sampling(self, max_tokens: int, grammar: str | None) -> SamplingParams:
        """Return how the engine chooses tokens; `grammar` is what it takes `wanted_output` for."""
        if (self.min_tokens or 0) > max_tokens:
            raise RequestInvalid(
                f"min_tokens asks for {str(self.min_tokens)[:20]} tokens and at most {max_tokens} are generated; "
                "lower min_tokens or raise the other",
                param="min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=self.num_prompt_logprobs,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            grammar=grammar,
        )


class ChatCompletionRequest(_GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ChosenTools | None = None  # None: auto
    parallel_tool_calls: bool | None = None  # False: an answer has one call at most
    chat_template_kwargs: dict[str, Any] | None = None  # what else the template reads, such as enable_thinking
    reasoning_effort: Literal["none"] | None = None  # do not think: for models that can be told so
    include_reasoning: bool | None = None  # False: what the model thinks is not told
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @property
    def tools_to_call(self) -> ToolChoice | None:
        """Which tools the answers may or must call; None: none."""
        if not self.tools or self.tool_choice == "none":
            return None
        tools = [definition.tool() for definition in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return ToolChoice([tool for tool in tools if tool.name == name], required=True, parallel=False)
        return ToolChoice(tools, self.tool_choice == "required", self.parallel_tool_calls is not False)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """For the chat template."""
        thinking = {} if self.reasoning_effort is None else {"enable_thinking": False}
        return thinking | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [definition.function.name for definition in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestInvalid("two tools have the same name", param="tools")
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if (wanted and wanted not in names) or (self.tool_choice == "required" and not names):
            raise RequestInvalid(f"{wanted or 'a tool'} is to be called, and is not among tools", param="tool_choice")
        choice = self.tools_to_call
        if choice is None:
            return self
        if self.structured_outputs is not None:
            raise RequestInvalid(
                "it does not go with tools; use response_format, or the tool_choice none", param="structured_outputs"
            )
        if choice.required and self.wanted_output is not None:
            raise RequestInvalid("the answer is a call, as tool_choice says: leave it out", param="response_format")
        for name in ("min_tokens", "ignore_eos"):
            if choice.needs_grammar and getattr(self, name):
                raise RequestInvalid(f"calls of tools say when the answer ends; leave out {name}", param=name)
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestInvalid("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As _GenerationBody says."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestInvalid(
                "max_tokens and max_completion_tokens differ; give max_completion_tokens only", param="max_tokens"
            )
        return self


def is_token_ids(value: object) -> TypeGuard[list[int]]:
    """Whether a part of a body is a list of numbers; True is none."""
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _as_prompts(prompt: object) -> list[str | list[int]]:
    """Several prompts are a list; one of them stands for a list of one."""
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    if len(prompts) > _MAX_PROMPTS:
        raise RequestInvalid(f"there are {len(prompts)} prompts; send at most {_MAX_PROMPTS} in a request")
    return [_as_prompt(one) for one in prompts]


def _as_prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, str):
        return refuse_surrogates(prompt)
    if is_token_ids(prompt):
        return prompt
    raise RequestInvalid("it must be a string, a list of token ids, or a list of these")


Prompts = Annotated[Any, AfterValidator(_as_prompts), WithJsonSchema(_PROMPTS)]  # list[str | list[int]]


class CompletionRequest(_GenerationBody):
    """The body of POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None  # the prompt is the beginning of the text
    max_tokens: Annotated[int, Field(ge=0)] | None = _COMPLETION_MAX_TOKENS  # 0: nothing but the echo
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None  # with echo those of the prompt too

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RequestInvalid(
                "there is nothing to answer without tokens and echo; give at least 1", param="max_tokens"
            )
        if self.echo and self.logprobs is not None and self.prompt_logprobs not in {None, self.logprobs}:
            raise RequestInvalid(
                "with echo, logprobs are those of the prompt too: give the same", param="prompt_logprobs"
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As _GenerationBody says."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As _GenerationBody says."""
        return self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs
