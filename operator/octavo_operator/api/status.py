"""What the operator tells of an InferenceService: its status, as a type of the CRD. Used by v1alpha1.py.

What is told and when: the module octavo_operator.status.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from octavo_operator.api.base import ListOf, Model


class Condition(Model):
    """One aspect of the service's state, as in metav1.Condition."""

    type: str = Field(min_length=1, max_length=63, description="The aspect, such as Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False, or Unknown while it is in progress.")
    reason: str = Field(min_length=1, max_length=256, description="Why, in one CamelCase word for programs.")
    message: str = Field(max_length=32_768, description="Why, and what to do about it, for people.")
    observed_generation: int = Field(ge=0, description="The metadata.generation that this speaks of.")
    last_transition_time: str = Field(
        max_length=64,
        description="When status changed last.",
        json_schema_extra={"format": "date-time"},
    )


class RolloutStatus(Model):
    """How pods take each other's place."""

    strategy: Literal["surge", "replace"] = Field(
        description="surge: a new pod comes before an old one goes. replace: an old one goes first."
    )
    message: str = Field(max_length=1024, description="Why so.")


class InferenceServiceStatus(Model):
    """What the operator sees."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="The metadata.generation that this status speaks of."
    )
    conditions: Annotated[
        ListOf[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = Field(default=(), description="The state, aspect by aspect; Ready sums it up.")
    url: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="The base URL of the OpenAI API inside the cluster: what goes into OPENAI_BASE_URL."
    )
    replicas: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Pods that there are.")
    ready_replicas: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Pods that serve the model.")
    selector: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="The label selector of the pods, for autoscalers and `kubectl get pods -l`."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Over how many GPUs each replica splits the model."
    )
    model: dict[str, Any] | None = Field(
        default=None, description="Facts of the model, as the engine read them from its file."
    )
    rollout: RolloutStatus | None = Field(default=None, description="How pods take each other's place.")
    engine_image: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="The engine image that the pods are to run."
    )
