"""What the types of the API are made of: the base model, rules that hold in CEL and in Python, bounded strings.

Used by v1alpha1.py (and by later versions). A rule is written once, as data beside the field or model it belongs to:
crd.py takes its CEL for the API server, pydantic runs its predicate everywhere else (`kubectl octavo render`, the
operator's own reading). One table of samples holds both to the same verdict (tests/operator/samples/).

Knows nothing of Kubernetes objects or of what the fields mean.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

CEL_KEYWORD: Final = "x-kubernetes-validations"
_UNKNOWN_FIELD: Final = "extra_forbidden"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A condition on a value, in the two languages that check it.

    Put it into `Annotated[...]` for a field, or into a model's `rules`.
    """

    cel: str  # `self` is the value; https://kubernetes.io/docs/reference/using-api/cel/
    holds: Callable[[Any], bool]  # the same on the parsed value, after defaults
    message: str  # what is wrong and what to change; shown after the field's path

    def check(self, value: T) -> T:
        """Return the value, or raise ValueError with the message."""
        if not self.holds(value):
            raise ValueError(self.message)
        return value

    def as_cel(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        return {"rule": self.cel, "message": self.message}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        json_schema.setdefault(CEL_KEYWORD, []).append(self.as_cel())
        return json_schema


def matches(pattern: str, message: str) -> Rule:
    """A rule that a whole string matches a pattern (in the syntax that RE2 and Python share)."""
    compiled = re.compile(pattern)
    quoted = pattern.replace("\\", "\\\\").replace("'", "\\'")
    return Rule(
        cel=f"self.matches('^(?:{quoted})$')",
        holds=lambda value: compiled.fullmatch(value) is not None,
        message=message,
    )


def cel_list(items: tuple[str, ...]) -> str:
    """A list of strings in CEL's notation."""
    return "[" + ", ".join(f"'{item}'" for item in items) + "]"


class Model(BaseModel):
    """The base of every type: immutable, camelCase outside, typed as strictly as the API server types.

    Unknown fields are ignored, so that an older operator lives with a newer CRD; who wants them refused passes
    `extra="forbid"` to `model_validate`, as the API server does with strict field validation.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", alias_generator=to_camel, validate_by_name=True)

    rules: ClassVar[tuple[Rule, ...]] = ()  # conditions over several fields

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        """Take a field that is null for one that is not there, as the API server does where null is no value."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        if broken := [rule.message for rule in self.rules if not rule.holds(self)]:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        if cls.rules:
            handler.resolve_ref_schema(json_schema)[CEL_KEYWORD] = [rule.as_cel() for rule in cls.rules]
        return json_schema

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON has it: camelCase, without what is not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# A list in YAML, a tuple here.
ListOf = Annotated[tuple[T, ...], Strict(strict=False)]

DNS_SUBDOMAIN: Final = "[a-z0-9]+(?:(?:-+|[.])[a-z0-9]+)*"
_LABEL_NAME: Final = "[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY: Final = rf"(?:{DNS_SUBDOMAIN}/)?{_LABEL_NAME}"

ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    matches(DNS_SUBDOMAIN, "must be an object's name: lower-case letters, digits, '-' and '.', such as my-object"),
]
DataKey = Annotated[
    str,
    Field(min_length=1, max_length=253),
    matches("[-._a-zA-Z0-9]+", "must be a key of a Secret or ConfigMap: letters, digits, '-', '_' and '.'"),
]
LabelValue = Annotated[
    str,
    Field(max_length=63),
    matches(
        "(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?",
        "must be a label value: letters, digits, '-', '_' and '.', with a letter or digit at both ends",
    ),
]
LabelKey = Annotated[
    str,
    Field(max_length=317),
    matches(_LABEL_KEY, "must have the form of a label key, such as team or example.com/team"),
]


def _valid_keys() -> Rule:
    compiled = re.compile(_LABEL_KEY)
    return Rule(
        cel=f"self.all(key, size(key) <= 317 && key.matches('^(?:{_LABEL_KEY})$'))",
        holds=lambda value: all(len(key) <= 317 and compiled.fullmatch(key) for key in value),
        message="every key must have the form of a label key, such as team or example.com/team",
    )


VALID_KEYS: Final = _valid_keys()  # for maps: all keys are what Kubernetes takes for labels and annotations


def int_to_text(value: Any) -> Any:
    """A whole number as text: what is a number in YAML may be a text in the API."""
    return str(value) if type(value) is int else value


_QUANTITY: Final = re.compile("([0-9]+(?:[.][0-9]+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_FACTORS: Final[dict[str | None, Decimal]] = {
    None: Decimal(1),
    "m": Decimal("0.001"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}

Quantity = Annotated[
    str,
    BeforeValidator(int_to_text),
    Field(max_length=32),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 32}),
    Rule(
        cel=f"string(self).matches('^{_QUANTITY.pattern}$')",
        holds=lambda value: _QUANTITY.fullmatch(value) is not None,
        message="must be a quantity such as 500m, 2 or 16Gi",
    ),
]


def quantity_value(quantity: str) -> Decimal:
    """The number that a valid Quantity stands for: cores or bytes."""
    match = _QUANTITY.fullmatch(quantity)
    assert match is not None, quantity
    return Decimal(match[1]) * _FACTORS[match[2]]


def explain(error: ValidationError) -> list[str]:
    """Pydantic's findings, a line each: the field's path and what to do about it."""
    lines = []
    for finding in error.errors(include_url=False, include_input=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"]).lstrip(".")
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == _UNKNOWN_FIELD:
            message = "unknown field"
        lines.append(f"{path}: {message}" if path else message)
    return lines
