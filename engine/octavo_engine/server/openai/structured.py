"""What an answer shall keep to: OpenAI's response_format, vLLM's structured_outputs. Used by protocol.py."""

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from octavo_engine.errors import RequestInvalid
from octavo_engine.server.body import Strict, Text
from octavo_engine.structured.checker import Wanted

_MAX_CHOICES: Final = 10_000


class JsonSchema(Strict):
    """The schema of response_format."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # None: any object
    description: Text | None = None  # for the model, which OpenAI does not show it to here either
    strict: bool | None = None  # every answer keeps to the schema, asked for or not


class ResponseFormat(Strict):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestInvalid("json_schema comes with the type json_schema, and only with it", param="json_schema")
        return self

    def wanted(self) -> Wanted | None:
        """Return what the answer shall keep to; None: nothing."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        param = "response_format.json_schema.schema" if schema is not None else "response_format"
        return Wanted.json(schema, param)


class StructuredOutputs(Strict):
    """vLLM's way to ask for JSON and for other things; exactly one of them."""

    json_: Annotated[dict[str, Any] | Text | None, Field(alias="json")] = None  # a schema, as an object or as text
    json_object: Literal[True] | None = None  # any object
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=_MAX_CHOICES)] | None = None
    grammar: Text | None = None  # Lark or GBNF

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.wanted() is None:
            raise RequestInvalid("give exactly one of json, json_object, regex, choice and grammar")
        return self

    def wanted(self) -> Wanted | None:
        """Return what the answer shall keep to; None: nothing is asked for."""
        if isinstance(self.json_, str):
            return Wanted("json_schema", self.json_, "structured_outputs.json")
        if self.json_ is not None or self.json_object:
            given = "json_object" if self.json_ is None else "json"
            return Wanted.json(self.json_, f"structured_outputs.{given}")
        if self.regex is not None:
            return Wanted("regex", self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return Wanted("choice", json.dumps(self.choice), "structured_outputs.choice")
        if self.grammar is not None:
            return Wanted("grammar", self.grammar, "structured_outputs.grammar")
        return None
