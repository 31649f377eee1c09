"""The parts of a spec that pass through to the pods: resources, placement, labels.

Used by v1alpha1.py only. Names and meanings are those of the core API; typed and bounded rather than a whole PodSpec,
which would be half a megabyte of schema.
"""

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from octavo_operator import names
from octavo_operator.api.affinity import Affinity
from octavo_operator.api.base import (
    VALID_KEYS,
    DataKey,
    LabelKey,
    LabelValue,
    ListOf,
    Model,
    ObjectName,
    Quantity,
    Rule,
    cel_list,
    matches,
    quantity_value,
)

# Labels by which the operator, Deployment and Service know their pods.
OWNED_LABELS: Final = tuple(sorted({*names.labels("x"), "pod-template-hash"}))


class ResourceList(Model):
    """Amounts of what a node has. GPUs are set by accelerator.count."""

    cpu: Quantity | None = Field(default=None, description="Cores, such as 500m or 4.")
    memory: Quantity | None = Field(
        default=None, description="Bytes, such as 16Gi. Holds the weights and the KV cache."
    )
    ephemeral_storage: Quantity | None = Field(
        default=None,
        alias="ephemeral-storage",
        description="Bytes on the node's disk, such as 20Gi. A remote model is stored there.",
    )


def _within_limit(field: str, cel_field: str) -> Rule:
    def holds(it: Any) -> bool:
        request, limit = getattr(it.requests, field), getattr(it.limits, field)
        return request is None or limit is None or quantity_value(request) <= quantity_value(limit)

    return Rule(
        cel="!has(self.requests) || !has(self.limits) || "
        f"!has(self.requests.{cel_field}) || !has(self.limits.{cel_field}) || "
        f"quantity(string(self.requests.{cel_field})).compareTo(quantity(string(self.limits.{cel_field}))) <= 0",
        holds=holds,
        message=f"requests of {field.replace('_', '-')} must not be greater than its limits",
    )


class ResourcesSpec(Model):
    """What each pod asks for and what it may use at most."""

    rules: ClassVar = (
        _within_limit("cpu", "cpu"),
        _within_limit("memory", "memory"),
        _within_limit("ephemeral_storage", "ephemeral__dash__storage"),
    )

    requests: ResourceList = Field(default=ResourceList(), description="What the scheduler sets aside on a node.")
    limits: ResourceList = Field(
        default=ResourceList(),
        description="What the container may use. The engine sizes its KV cache within the memory limit.",
    )


class Toleration(Model):
    """Lets the pods run on nodes with a matching taint."""

    rules: ClassVar = (
        Rule(
            cel="self.operator == 'Exists' || has(self.key)",
            holds=lambda it: it.operator == "Exists" or it.key is not None,
            message="operator Equal needs a key; to tolerate every taint, set operator to Exists",
        ),
        Rule(
            cel="self.operator == 'Equal' || !has(self.value)",
            holds=lambda it: it.operator == "Equal" or it.value is None,
            message="operator Exists takes no value: leave value out, or set operator to Equal",
        ),
        Rule(
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            holds=lambda it: it.toleration_seconds is None or it.effect == "NoExecute",
            message="tolerationSeconds needs effect NoExecute",
        ),
    )

    key: Annotated[LabelKey, Field(min_length=1)] | None = Field(
        default=None, description="The taint's key. Not set: every key, with operator Exists."
    )
    operator: Literal["Equal", "Exists"] = Field(default="Equal", description="How key and value relate to the taint.")
    value: LabelValue | None = Field(default=None, description="The taint's value, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect. Not set: every effect."
    )
    toleration_seconds: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How long to stay on a node that gets a NoExecute taint. Not set: for ever."
    )


class KeyReference(Model):
    """One value in a Secret or ConfigMap of this namespace."""

    name: ObjectName = Field(description="The object's name.")
    key: DataKey = Field(description="The key in its data.")


class EnvSource(Model):
    """Where a variable's value is."""

    rules: ClassVar = (
        Rule(
            cel="has(self.secretKeyRef) != has(self.configMapKeyRef)",
            holds=lambda it: (it.secret_key_ref is None) != (it.config_map_key_ref is None),
            message="must have either secretKeyRef or configMapKeyRef",
        ),
    )

    secret_key_ref: KeyReference | None = Field(default=None, description="A value in a Secret.")
    config_map_key_ref: KeyReference | None = Field(default=None, description="A value in a ConfigMap.")


class EnvVar(Model):
    """A variable in the environment of the engine and of what pulls the model."""

    rules: ClassVar = (
        Rule(
            cel="has(self.value) != has(self.valueFrom)",
            holds=lambda it: (it.value is None) != (it.value_from is None),
            message="must have either value or valueFrom",
        ),
        Rule(
            cel="self.name != 'HF_TOKEN'",
            holds=lambda it: it.name != "HF_TOKEN",
            message="HF_TOKEN is set by model.tokenSecret: set that instead",
        ),
    )

    name: Annotated[
        str,
        Field(min_length=1, max_length=128),
        matches("[A-Za-z_][A-Za-z0-9_]*", "must be letters, digits and '_', such as HF_ENDPOINT"),
    ] = Field(description="The variable's name.")
    value: Annotated[str, Field(max_length=4096)] | None = Field(default=None, description="Its value.")
    value_from: EnvSource | None = Field(default=None, description="Where its value is.")


class TopologySpreadConstraint(Model):
    """Spreads the pods of this service over parts of the cluster."""

    max_skew: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="By how many pods two parts may differ."
    )
    topology_key: Annotated[LabelKey, Field(min_length=1)] = Field(
        description="The label of nodes that tells the parts apart, such as topology.kubernetes.io/zone."
    )
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        default="ScheduleAnyway", description="Whether a pod that would break this waits or is scheduled anyway."
    )


class ImagePullSecret(Model):
    """A Secret of this namespace."""

    name: ObjectName = Field(description="The Secret's name.")


class PodSettings(Model):
    """What else the pods need on this cluster."""

    node_selector: Annotated[dict[str, LabelValue], Field(max_length=16), VALID_KEYS] = Field(
        default={}, description="Labels that a node must have."
    )
    tolerations: Annotated[
        ListOf[Toleration], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(
        default=(),
        description="Taints that the pods tolerate. For GPUs the usual one, nvidia.com/gpu, is always there.",
    )
    labels: Annotated[
        dict[str, LabelValue],
        Field(max_length=32),
        VALID_KEYS,
        Rule(
            cel=f"self.all(key, !(key in {cel_list(OWNED_LABELS)}))",
            holds=lambda it: not any(key in OWNED_LABELS for key in it),
            message=f"must not contain a label that the operator sets: {', '.join(OWNED_LABELS)}",
        ),
    ] = Field(default={}, description="More labels for the pods.")
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=32), VALID_KEYS] = Field(
        default={}, description="Annotations for the pods."
    )
    image_pull_secrets: Annotated[
        ListOf[ImagePullSecret],
        Field(
            max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
        Rule(
            cel="self.all(secret, self.exists_one(other, other.name == secret.name))",
            holds=lambda it: len({secret.name for secret in it}) == len(it),
            message="must name each Secret once",
        ),
    ] = Field(default=(), description="Secrets with the credentials of the engine image's registry.")
    priority_class_name: ObjectName | None = Field(
        default=None, description="The PriorityClass: who gives way when GPUs are short."
    )
    runtime_class_name: ObjectName | None = Field(
        default=None, description="The RuntimeClass, such as nvidia where that is not the nodes' default."
    )
    env: Annotated[
        ListOf[EnvVar],
        Field(
            max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
        Rule(
            cel="self.all(one, self.exists_one(other, other.name == one.name))",
            holds=lambda it: len({one.name for one in it}) == len(it),
            message="must name each variable once",
        ),
    ] = Field(
        default=(), description="Variables such as HF_ENDPOINT or HTTPS_PROXY, for the engine and what pulls the model."
    )
    affinity: Affinity | None = Field(default=None, description="On which nodes and beside which pods they run.")
    topology_spread_constraints: Annotated[
        ListOf[TopologySpreadConstraint],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["topologyKey"]},
        ),
        Rule(
            cel="self.all(one, self.exists_one(other, other.topologyKey == one.topologyKey))",
            holds=lambda it: len({one.topology_key for one in it}) == len(it),
            message="must name each topologyKey once",
        ),
    ] = Field(default=(), description="How the pods of this service spread over nodes, zones and the like.")
