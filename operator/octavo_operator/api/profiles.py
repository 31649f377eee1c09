"""Further names of the model, each with ways of its own: spec.profiles. Used by v1alpha1.py.

A profile is a Modelfile as data. Its parameters have the names and bounds of Modelfiles, so that who has one can copy
it; of those that the engine has under other options, or not at all, there is no field. What is valid here is valid for
the engine's `--profiles` (tests/operator/test_command_line_border.py): nobody is there to be told when a file that an
engine reads again turns out to be wrong.
"""

import re
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from octavo_operator.api.base import ListOf, Model, Rule, int_to_text
from octavo_operator.api.model import NOT_LATEST, ServedName

_NUMBER: Final = "-?[0-9]{1,9}(?:[.][0-9]{1,9})?"
_THREE_QUOTES: Final = '(?m)"""[ \\t\\r]*$'


def _within(least: float, most: float) -> Rule:
    """A rule that a text is a number in a range."""

    def holds(text: str) -> bool:
        return re.fullmatch(_NUMBER, text) is not None and least <= float(text) <= most

    return Rule(
        cel=f"string(self).matches('^(?:{_NUMBER})$') && "
        f"double(string(self)) >= {float(least)} && double(string(self)) <= {float(most)}",
        holds=holds,
        message=f'must be a number from {least:g} to {most:g}; one with a decimal point in quotes, such as "0.7"',
    )


# Kubernetes has no floating-point numbers in specs: a whole number, or a text.
_Number = Annotated[
    str,
    BeforeValidator(int_to_text),
    Field(max_length=20),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 20}),
]
_QUOTABLE: Final = Rule(
    cel=f"!self.matches('{_THREE_QUOTES.replace(chr(92), chr(92) * 2)}')",
    holds=lambda text: re.search(_THREE_QUOTES, text) is None,
    message='must not have """ at the end of a line, where it would end a Modelfile\'s text',
)


class Parameters(Model):
    """How answers are sampled, as PARAMETER of a Modelfile says it. What is left out is the engine's default."""

    model_config = ConfigDict(alias_generator=None)

    temperature: Annotated[_Number, _within(0, 100)] | None = Field(
        default=None, description="How freely tokens are drawn; 0 always takes the likeliest."
    )
    top_p: Annotated[_Number, _within(0, 1)] | None = Field(
        default=None, description="Draw from the likeliest tokens that have this share of the probability together."
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="Draw from so many of the likeliest tokens; 0 and -1 mean all."
    )
    min_p: Annotated[_Number, _within(0, 1)] | None = Field(
        default=None, description="Draw from the tokens that have this share of the likeliest one's probability."
    )
    repeat_penalty: Annotated[_Number, _within(0.01, 100)] | None = Field(
        default=None, description="Above 1, tokens that were there before become less likely."
    )
    presence_penalty: Annotated[_Number, _within(-100, 100)] | None = Field(
        default=None, description="Above 0, tokens that the answer has already become less likely."
    )
    frequency_penalty: Annotated[_Number, _within(-100, 100)] | None = Field(
        default=None, description="Above 0, tokens become less likely each time that the answer has them."
    )
    seed: Annotated[int, Field(ge=-1, le=2**53 - 1)] | None = Field(
        default=None, description="The same seed and request get the same answer; -1 takes another seed each time."
    )
    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1)] | None = Field(
        default=None, description="Tokens of an answer at most; -1 and -2: as many as the context has room for."
    )
    num_ctx: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = Field(
        default=None, description="Tokens of prompt and answer together at most; not above the engine's maxModelLen."
    )
    stop: (
        Annotated[
            ListOf[Annotated[str, Field(min_length=1, max_length=256), _QUOTABLE]], Field(min_length=1, max_length=16)
        ]
        | None
    ) = Field(default=None, description="Texts that end an answer and are not part of it.")


class Message(Model):
    """A message with which every conversation begins."""

    role: Literal["system", "user", "assistant"] = Field(description="Who says it.")
    content: Annotated[str, Field(min_length=1, max_length=8192), _QUOTABLE] = Field(description="What is said.")


class Profile(Model):
    """A further name of the model, with a system message, parameters and messages of its own."""

    rules: ClassVar = (NOT_LATEST,)

    name: ServedName = Field(description="The name by which clients ask for it.")
    system: Annotated[str, Field(min_length=1, max_length=16384), _QUOTABLE] | None = Field(
        default=None, description="The system message of requests that have none. Default: the model's own."
    )
    parameters: Parameters = Field(
        default=Parameters(), description="How answers are sampled where the request does not say it."
    )
    messages: Annotated[
        ListOf[Message], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(default=(), description="How every conversation begins, as examples for the model.")

    def as_engine_reads_it(self) -> dict[str, Any]:
        """The profile as an entry of the engine's `--profiles` file."""
        return {key: value for key, value in self.to_dict().items() if value}


Profiles = Annotated[
    ListOf[Profile],
    Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    Rule(
        cel="self.all(one, self.exists_one(other, other.name == one.name))",
        holds=lambda it: len({one.name for one in it}) == len(it),
        message="must name each profile once",
    ),
]
