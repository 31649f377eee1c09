"""Tools in OpenAI's requests: which there are, which to call, which were called before. Used by protocol.py."""

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.server.body import Strict, Text
from octavo_engine.text.tools import Tool

MAX_TOOLS: Final = 128  # OpenAI's limit

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None  # the JSON schema of its arguments; None: it takes none
    strict: bool | None = None  # calls keep to the schema

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise RequestInvalid("arguments are an object: give the schema of one", param="parameters.type")
        if not isinstance((self.parameters or {}).get("properties", {}), dict):
            raise RequestInvalid("properties must be an object", param="parameters.properties")
        return self


class ToolDefinition(Strict):
    """A tool, of the one kind that there is."""

    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> Tool:
        """Return it as the rest of the server knows it."""
        function = self.function
        parameters = {"type": "object", "properties": {}} | (function.parameters or {"additionalProperties": False})
        description = {"description": function.description} if function.description is not None else {}
        described = {"name": function.name} | description | {"parameters": function.parameters or parameters}
        return Tool(function.name, parameters, bool(function.strict), {"type": "function", "function": described})


class FunctionName(Strict):
    """One of the functions."""

    name: ToolName


class NamedTool(Strict):
    """A tool that shall be called."""

    type: Literal["function"]
    function: FunctionName


def _of_known_kind(choice: object) -> object:
    if isinstance(choice, str) and choice in {"none", "auto", "required"}:
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        return choice
    raise RequestInvalid('it must be none, auto, required or {"type": "function", "function": {"name": ...}}')


ChosenTools = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_of_known_kind)]


class FunctionCall(Strict):
    """What was called, and with what."""

    name: Text
    arguments: Text = "{}"  # JSON, as the model wrote it


class ToolCall(Strict):
    """A call in a message of before."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of the call in a stream, which clients may leave in

    def for_template(self) -> dict[str, Any]:
        """Return the call as templates know it: with arguments as an object, if they are one."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self.function.arguments  # the model may have written it so
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}
