"""The bodies of Ollama's requests. Every field works, is accepted where it asks for nothing, or is refused by name.

Field names and meanings: Ollama's API reference. `options` are parameters.py's.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from octavo_engine.errors import ModelfileInvalid, RequestInvalid
from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.parameters import Parameters, check_all
from octavo_engine.server.body import Neutral, Strict, Text, describing, only, without_neutral
from octavo_engine.server.openai.tools import MAX_TOOLS, ToolDefinition
from octavo_engine.structured.checker import Wanted
from octavo_engine.text.template import Message
from octavo_engine.text.tools import ToolChoice

# Fields that clients send, at the values at which they ask for nothing. null always asks for nothing.
NEUTRAL_FIELDS: Final[Mapping[str, Neutral]] = {
    "context": only([], instead="send the conversation to /api/chat"),
    "height": only(0),
    "images": only([], instead="this engine has no models that see images"),
    "shift": only(False, instead="a full context ends the answer, and nothing of it is dropped"),
    "steps": only(0),
    "suffix": only(""),
    "truncate": only(False, instead="an overlong prompt is an error, and nothing of it is cut"),
    "width": only(0),
}
NEUTRAL_MESSAGE_FIELDS: Final[dict[str, Neutral]] = {
    "images": only([], instead="this engine has no models that see images"),
}

NEUTRAL_OPENING_FIELDS: Final[Mapping[str, Neutral]] = NEUTRAL_MESSAGE_FIELDS | {
    name: only(nothing, instead="a MESSAGE of a Modelfile is a text")
    for name, nothing in {"thinking": "", "tool_calls": [], "tool_name": "", "tool_call_id": ""}.items()
}
NEUTRAL_EMBED_FIELDS: Final[Mapping[str, Neutral]] = {
    "dimensions": only(0, instead="an embedding has as many numbers as the model's states have"),
    "truncate": only(False, instead="an overlong text is an error, and nothing of it is cut"),
}
NEUTRAL_TRANSFER_FIELDS: Final[Mapping[str, Neutral]] = {
    "insecure": only(False, instead="a registry on this machine is spoken to without TLS, others are not"),
    "username": only(""),
    "password": only("", instead="passwords are those of `docker login`"),
}
NEUTRAL_CREATE_FIELDS: Final[Mapping[str, Neutral]] = {
    "info": only({}),
    "modelfile": only("", instead="send its instructions as fields, as Ollama's clients do since 0.5.5"),
    "parser": only(""),
    "quantize": only("", instead="quantise the GGUF file before"),
    "renderer": only(""),
    "requires": only(""),
    "draft": only(""),
}

_MAX_NAME: Final = 512
_MAX_TOP_LOGPROBS: Final = 20
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(?P<sign>[+-]?)(?P<parts>(?:\d+(?:\.\d*)?(?:ns|us|µs|ms|s|m|h))+)", re.ASCII)
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", re.ASCII)


def _seconds(value: object) -> float | None:
    """Read a duration: seconds, or as Go writes it (5m, 1h30m). A negative one has no end."""
    if value is None:
        return None
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(match["parts"]))
        seconds = -seconds if match["sign"] == "-" else seconds
    elif isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value, re.ASCII):
        seconds = float(value)
    if math.isnan(seconds):
        raise RequestInvalid(f"{repr(value)[:50]} is not a number of seconds, or a duration such as 5m or 1h30m")
    return math.inf if seconds < 0 else seconds


def _checked_options(value: object) -> object:
    if not isinstance(value, dict):
        raise RequestInvalid("options must be an object")
    return check_all(value)


class _ModelBody(Strict):
    """What all endpoints that use a model have in common."""

    model: Annotated[str, Field(min_length=1)]
    options: Annotated[dict[str, Any], BeforeValidator(_checked_options)] | None = None
    keep_alive: Annotated[Any, AfterValidator(_seconds)] = None  # seconds


class EmbedRequest(_ModelBody):
    """The body of POST /api/embed. Of the options none is about embeddings."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_EMBED_FIELDS))

    input: Text | list[Text]

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_EMBED_FIELDS)


class EmbeddingsRequest(_ModelBody):
    """The body of POST /api/embeddings, as it was before /api/embed."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_EMBED_FIELDS))

    prompt: Text

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_EMBED_FIELDS)


class _GenerationBody(_ModelBody):
    """What both endpoints that generate have in common."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_FIELDS))

    stream: bool | None = None  # null: true
    format: Literal["", "json"] | dict[str, Any] | None = None  # json: any object; or a schema
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None  # null: models that can do

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_FIELDS)

    @property
    def parameters(self) -> Parameters:
        """The options."""
        return self.options or {}

    @property
    def wanted_output(self) -> Wanted | None:
        """What the answer shall keep to; None: nothing."""
        if self.format is None or self.format == "":
            return None
        return Wanted.json(self.format if isinstance(self.format, dict) else None, "format")

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell with the logprob of each token; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None


class GenerateRequest(_GenerationBody):
    """The body of POST /api/generate."""

    prompt: Text | None = None  # null or empty: only load the model
    system: Text | None = None
    template: Text | None = None  # in Go's language, in place of the model's
    raw: bool | None = None  # the prompt is taken as it is, without a template

    @model_validator(mode="after")
    def _check_raw(self) -> "GenerateRequest":
        for name in ("system", "template", "think"):
            if self.raw and getattr(self, name):
                raise RequestInvalid(f"{name} does not go with raw: true, which leaves templates out", param=name)
        return self


class CalledFunction(Strict):
    """What was called, and with what."""

    name: Text
    arguments: dict[str, Any] | None = None  # null: none
    index: int | None = None  # of the call in its answer, which clients may leave in


class MadeCall(Strict):
    """A call in a message of before."""

    function: CalledFunction
    id: Text | None = None
    type: Literal["function"] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the call as templates know it."""
        function = {"name": self.function.name, "arguments": self.function.arguments or {}}
        return {"id": self.id or "", "type": "function", "function": function}


class ChatMessage(Strict):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_MESSAGE_FIELDS))

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None  # what the model thought before an answer of before
    tool_calls: list[MadeCall] | None = None  # that the model made
    tool_name: Text | None = None  # whose result the content is
    tool_call_id: Text | None = None  # the call that it is the result of

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_MESSAGE_FIELDS)

    @model_validator(mode="after")
    def _check_role(self) -> "ChatMessage":
        for name, role in (("tool_calls", "assistant"), ("tool_name", "tool"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise RequestInvalid(f"only messages of the role {role} have it", param=name)
        return self

    def for_template(self) -> Message:
        """Return the message as templates know it."""
        named = {"reasoning_content": self.thinking, "name": self.tool_name, "tool_call_id": self.tool_call_id}
        given = {name: value for name, value in named.items() if value}
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": self.content or ""} | given | calls


class ChatRequest(_GenerationBody):
    """The body of POST /api/chat."""

    messages: list[ChatMessage] | None = None  # null or empty: only load the model
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None

    @property
    def tools_to_call(self) -> ToolChoice | None:
        """Which tools the answer may call; None: none."""
        return ToolChoice([definition.tool() for definition in self.tools]) if self.tools else None


Name = Annotated[str, Field(min_length=1, max_length=_MAX_NAME)]


class ModelRequest(Strict):
    """A body that names a model."""

    model: Name | None = None
    name: Name | None = None  # what `model` was called before

    @model_validator(mode="after")
    def _check_name(self) -> "ModelRequest":
        if self.model is None and self.name is None:
            raise RequestInvalid("model is required", param="model")
        return self

    @property
    def which(self) -> str:
        """The model that is meant."""
        return self.model or self.name or ""


class ShowRequest(ModelRequest):
    """The body of POST /api/show."""

    verbose: bool | None = None  # the long lists of model_info too


class TransferRequest(ModelRequest):
    """The body of POST /api/pull and /api/push."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_TRANSFER_FIELDS))

    stream: bool | None = None  # null: true

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_TRANSFER_FIELDS)


class CopyRequest(Strict):
    """The body of POST /api/copy."""

    source: Name
    destination: Name


class OpeningMessage(Strict):
    """A message with which every conversation of a model begins."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_OPENING_FIELDS))

    role: Literal["system", "user", "assistant"]
    content: Text = ""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_OPENING_FIELDS)


class CreateRequest(ModelRequest):
    """The body of POST /api/create: a Modelfile's instructions as fields."""

    model_config = ConfigDict(json_schema_extra=describing(NEUTRAL_CREATE_FIELDS))

    base: Annotated[Name | None, Field(alias="from")] = None
    files: dict[str, str] | None = None  # digests of uploaded blobs by file names
    adapters: dict[str, str] | None = None  # the same, of a LoRA adapter: PEFT's two files, or a GGUF file
    template: Text | None = None
    license: Text | list[Text] | None = None
    system: Text | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_checked_options)] | None = None
    messages: list[OpeningMessage] | None = None
    stream: bool | None = None  # null: true

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: object) -> object:
        return without_neutral(body, NEUTRAL_CREATE_FIELDS)

    @model_validator(mode="after")
    def _check_base(self) -> "CreateRequest":
        if (self.base is None) == (not self.files):
            raise RequestInvalid("either from or files says which model it is made of", param="from")
        if self.adapters and self.base is None:
            raise RequestInvalid(
                "adapters are for a model that is there: make one of files first, and this one from it",
                param="adapters",
            )
        return self

    def modelfile(self) -> Modelfile:
        """Return what the fields say, of a base without a name.

        Raises:
            RequestInvalid: the template is wrong.
        """
        licenses = [self.license] if isinstance(self.license, str) else self.license or []
        modelfile = Modelfile(
            source=self.base or "model.gguf",
            template=self.template or "",
            system=self.system or "",
            parameters=self.parameters or {},
            messages=tuple((message.role, message.content) for message in self.messages or []),
            licenses=tuple(licenses),
        )
        try:
            return parse_modelfile(modelfile.render())
        except ModelfileInvalid as error:
            raise RequestInvalid(str(error), param="template") from None
