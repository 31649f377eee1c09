"""The bodies of OpenAI's requests. Every field works, is accepted where it asks for nothing, or is refused by name.

Field names and meanings: OpenAI's API reference; top_k, min_p, repetition_penalty, min_tokens, stop_token_ids,
include_stop_str_in_output and ignore_eos are vLLM's.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.plan import SamplingParams
from octavo_engine.server.body import Strict, Text, of_kind, only, refuse_surrogates, without_neutral

_COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's and vLLM's default for /v1/completions

_MAX_STOP_STRINGS: Final = 4  # OpenAI's limit
_MAX_STOP_TOKENS: Final = 256
_MAX_CHOICES: Final = 128  # OpenAI's limit
_MAX_BIASED_TOKENS: Final = 1024
_MAX_TOP_LOGPROBS: Final = 20  # OpenAI's limit for chats; vLLM's for both


# Fields that SDKs and frameworks send, at the values at which they ask for nothing. null always asks for nothing.
NEUTRAL_FIELDS: Final[Mapping[str, Callable[[object], bool]]] = {
    "audio": only(),
    "best_of": only(1),
    "echo": only(False),
    "function_call": only("none", "auto"),
    "functions": only([]),
    "metadata": of_kind(dict),
    "modalities": only(["text"]),
    "parallel_tool_calls": of_kind(bool),
    "prediction": only(),
    "prompt_cache_key": of_kind(str),
    "prompt_cache_retention": of_kind(str),
    "reasoning_effort": only("none"),
    "response_format": only({"type": "text"}),
    "safety_identifier": of_kind(str),
    "service_tier": only("auto", "default"),
    "skip_special_tokens": only(True),
    "store": only(False),
    "suffix": only(""),
    "tool_choice": only("none", "auto"),
    "tools": only([]),
    "user": of_kind(str),
    "verbosity": only("medium"),
    "web_search_options": only(),
}

# The same for the messages that clients send back as history.
NEUTRAL_MESSAGE_FIELDS: Final[Mapping[str, Callable[[object], bool]]] = {
    "annotations": only([]),
    "audio": only(),
    "function_call": only(),
    "refusal": only(),
    "tool_calls": only([]),
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

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined_text)]
    name: Text | None = None  # for templates that show it

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_MESSAGE_FIELDS)

    def for_template(self) -> dict[str, str]:
        """Return the message as templates know it, where `developer` is called `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name is not None else {})


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _token_id(key: object) -> object:
    """JSON's keys are strings, so a token id comes as its digits."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    raise RequestInvalid(f"the key {str(key)[:20]!r} is not a token id")


_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _GenerationBody(Strict):
    """What both endpoints have in common."""

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
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=_MAX_STOP_STRINGS)] | None,
        BeforeValidator(_as_list),
    ] = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_FIELDS)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestInvalid("stream_options needs stream: true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell with the logprob of each token; None: no logprobs at all."""
        raise NotImplementedError

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return how the engine chooses tokens."""
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
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatCompletionRequest(_GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

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


def _only_prompt(prompt: object) -> object:
    """A list of one prompt is that prompt: frameworks send it so."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RequestInvalid("a list of prompts is not supported; send one request for each")
        return prompt[0]
    return prompt


def _is_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return refuse_surrogates(prompt)
    if isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt):
        return prompt
    raise RequestInvalid("prompt must be a string or a list of token ids")


class CompletionRequest(_GenerationBody):
    """The body of POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_is_prompt), BeforeValidator(_only_prompt)]
    max_tokens: Annotated[int, Field(ge=1)] | None = _COMPLETION_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As _GenerationBody says."""
        return self.logprobs
