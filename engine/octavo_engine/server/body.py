"""What the bodies of all requests have in common, whoever's API they are of: unknown fields are refused by name."""

from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from octavo_engine.errors import RequestInvalid


def only(*values: object) -> Callable[[object], bool]:
    """Accept exactly these values, where False is not 0."""
    return lambda value: any(
        value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values
    )


def of_kind(kind: type) -> Callable[[object], bool]:
    """Accept whatever is of this type."""
    return lambda value: isinstance(value, kind)


def without_neutral(body: object, neutral: Mapping[str, Callable[[object], bool]]) -> object:
    """Drop the fields that ask for nothing: null, or a value that `neutral` accepts.

    Raises:
        RequestInvalid: such a field asks for something; names it.
    """
    if not isinstance(body, dict):
        return body
    for name in body.keys() & neutral.keys():
        if body[name] is not None and not neutral[name](body[name]):
            raise RequestInvalid("this server does not support the value given", param=name)
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
