"""What the bodies of all requests have in common, whoever's API they are of: unknown fields are refused by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from octavo_engine.errors import RequestInvalid


@dataclass(frozen=True, slots=True)
class Neutral:
    """A field that is accepted where it asks for nothing; null always does."""

    accepts: Callable[[object], bool]
    values: str  # what is accepted besides null, as JSON; empty: nothing is
    instead: str  # the way out for who asks for more; may be empty
    schema: Mapping[str, Any]  # the same as a JSON schema


def only(*values: object, instead: str = "") -> Neutral:
    """Accept exactly these values, where False is not 0."""
    return Neutral(
        lambda value: any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values
        ),
        ", ".join(json.dumps(value) for value in values),
        instead,
        {"enum": [None, *values]},
    )


def of_kind(kind: type) -> Neutral:
    """Accept whatever is of this type."""
    names = {dict: "any object", str: "any string", bool: "true, false"}
    types = {dict: "object", str: "string", bool: "boolean"}
    return Neutral(lambda value: isinstance(value, kind), names[kind], "", {"type": [types[kind], "null"]})


def describing(neutral: Mapping[str, Neutral]) -> Callable[[dict[str, Any]], None]:
    """Return what adds fields that ask for nothing to the JSON schema of a body (pydantic's json_schema_extra)."""

    def describe(schema: dict[str, Any]) -> None:
        for name, field in neutral.items():
            told = f"accepted, and asks for nothing{'; instead: ' if field.instead else ''}{field.instead}"
            schema["properties"].setdefault(name, {**field.schema, "description": told})

    return describe


def without_neutral(body: object, neutral: Mapping[str, Neutral]) -> object:
    """Drop the fields that ask for nothing: null, or a value that `neutral` accepts.

    Raises:
        RequestInvalid: such a field asks for something; names it.
    """
    if not isinstance(body, dict):
        return body
    for name in body.keys() & neutral.keys():
        field = neutral[name]
        if body[name] is not None and not field.accepts(body[name]):
            accepted = f"null, {field.values}" if field.values else "null"
            way_out = f"; {field.instead}" if field.instead else ""
            raise RequestInvalid(f"the value given is not supported, only {accepted}{way_out}", param=name)
    return {name: value for name, value in body.items() if name not in neutral}


class Strict(BaseModel):
    """A body, or an object in one, whose values have the types of their fields and nothing else is in it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def refuse_surrogates(text: str) -> str:
    """JSON can spell half of a character, which no encoding of text can hold."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise RequestInvalid("the text has a lone surrogate, which is not a character")
    return text


Text = Annotated[str, AfterValidator(refuse_surrogates)]
