"""LoRA adapters that are served beside the model: spec.adapters. Used by v1alpha1.py.

An adapter comes from where models come from, by the same notation, and with a right of its own: it is often private
where the model is not. Which adapters a pod serves is part of its template, so that a change is a rollout.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from octavo_operator.api.base import ListOf, Model, Rule
from octavo_operator.api.model import NOT_LATEST, SECRET_RULES, CredentialsSecret, ServedName, TokenSecret
from octavo_operator.api.source import ADAPTER_RULES


class Adapter(Model):
    """A LoRA adapter of the model, which is served under a name of its own."""

    rules: ClassVar = (NOT_LATEST, *SECRET_RULES)

    name: ServedName = Field(description="The name by which clients ask for it.")
    source: Annotated[str, Field(min_length=1, max_length=512), *ADAPTER_RULES] = Field(
        description="Where it is, as in model.source but for ollama://: a folder as PEFT writes it, or a GGUF file."
    )
    token_secret: TokenSecret | None = Field(default=None, description="As in model, for an hf:// source.")
    credentials_secret: CredentialsSecret | None = Field(
        default=None, description="As in model, for an s3:// or oci:// source."
    )


Adapters = Annotated[
    ListOf[Adapter],
    Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    Rule(
        cel="self.all(one, self.exists_one(other, other.name == one.name))",
        holds=lambda it: len({one.name for one in it}) == len(it),
        message="must name each adapter once",
    ),
]
