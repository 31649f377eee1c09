"""InferenceService, serving.octavo.dev/v1alpha1: the spec that users write and the status that the operator writes.

The source of the CRD (crd.py), of the checks of `kubectl octavo render` and of what the operator reads. Descriptions
are what `kubectl explain` prints. Every string, list and map is bounded, so that CEL stays within its cost budget.
Defaults live here and so in the CRD; the operator never writes a spec. The one field whose absence has a meaning is
`replicas`: a default there would collide with `autoscaling`.

Knows nothing of the children that follow from a spec: desired/.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from octavo_operator import names
from octavo_operator.api.adapters import Adapters
from octavo_operator.api.autoscaling import AutoscalingSpec
from octavo_operator.api.base import (
    DataKey,
    LabelValue,
    ListOf,
    Model,
    ObjectName,
    Rule,
    cel_list,
    matches,
)
from octavo_operator.api.model import AWS_KEYS, ModelSpec
from octavo_operator.api.network import Peer
from octavo_operator.api.pod import PodSettings, ResourcesSpec
from octavo_operator.api.profiles import Profiles
from octavo_operator.api.status import InferenceServiceStatus

# Flags of `octavo serve` that are the operator's: it renders them, or they would undo what it renders.
OWNED_FLAGS: Final = (
    "--api-key",
    "--api-key-file",
    "--api-key-for-all",
    "--device",
    "--dtype",
    "--gpu-memory-utilization",
    "--host",
    "--lora-modules",
    "--max-model-len",
    "--max-num-seqs",
    "--port",
    "--profiles",
    "--quantization",
    "--served-model-name",
    "--shutdown-timeout",
    "--tensor-parallel-size",
    "--termination-log",
)


class AcceleratorSpec(Model):
    """The hardware of each replica."""

    rules: ClassVar = (
        Rule(
            cel="self.type != 'nvidia' || has(self.count)",
            holds=lambda it: it.type != "nvidia" or it.count is not None,
            message="type nvidia needs count: the number of GPUs for each replica, 1 to 16",
        ),
        Rule(
            cel="self.type != 'cpu' || !has(self.count)",
            holds=lambda it: it.type != "cpu" or it.count is None,
            message="count is a number of GPUs: set type to nvidia, or leave count out",
        ),
        Rule(
            cel="self.type != 'cpu' || !has(self.product)",
            holds=lambda it: it.type != "cpu" or it.product is None,
            message="product is a model of GPU: set type to nvidia, or leave product out",
        ),
    )

    type: Literal["cpu", "nvidia"] = Field(
        default="cpu", description="cpu, or nvidia for GPUs that the NVIDIA device plugin offers."
    )
    count: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None,
        description="GPUs for each replica. The model is split over all of them: this is the tensor-parallel size.",
    )
    product: Annotated[LabelValue, Field(min_length=1)] | None = Field(
        default=None,
        description="Run only on nodes with this model of GPU, as their label nvidia.com/gpu.product names it, such as "
        "NVIDIA-H100-80GB-HBM3.",
    )

    @property
    def tensor_parallel_size(self) -> int:
        """The number of ranks that share the model."""
        return self.count or 1


class EngineSpec(Model):
    """How the engine runs the model."""

    image: (
        Annotated[
            str,
            Field(min_length=1, max_length=512),
            matches(
                "[A-Za-z0-9][-A-Za-z0-9._:/@]*", "must be an image reference such as registry.example/octavo-engine:1.0"
            ),
        ]
        | None
    ) = Field(
        default=None, description="The engine's container image. Default: the one that the operator was installed with."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What computes. auto: cuda with accelerator.type nvidia, else cpu."
    )
    gpu_memory_utilization: (
        Annotated[
            str,
            Field(max_length=8),
            matches(
                "0[.][0-9]{0,3}[1-9][0-9]{0,3}|1([.]0)?", 'must be a share above 0 and up to 1 in quotes, such as "0.9"'
            ),
        ]
        | None
    ) = Field(
        default=None, description="The share of each GPU's memory that the engine may use. Default: the engine's, 0.9."
    )
    quantization: Literal["auto", "none", "gptq", "awq", "fp8", "compressed-tensors"] | None = Field(
        default=None,
        description="auto: weights stay packed as the files have them, where the device computes with them; none: they "
        "are unpacked to dtype; a method: as auto, and a model of another one is refused. Default: the engine's, auto.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of computation and KV cache. auto: on CPUs int8 with quantised weights, else bfloat16 "
        "where the hardware computes it, else float32.",
    )
    max_model_len: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None,
        description="The longest prompt and answer together, in tokens. Default: what the model and the memory allow.",
    )
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Requests that may run at once in one replica; more wait. Default: the engine's."
    )
    extra_args: Annotated[
        ListOf[
            Annotated[
                str,
                Field(max_length=256),
                matches("--[a-z][-a-z0-9]*(?:=[^\\x00-\\x1f]*)?", "must have the form --flag or --flag=value"),
            ]
        ],
        Field(max_length=32),
        Rule(
            cel=f"self.all(arg, !(arg.split('=')[0] in {cel_list(OWNED_FLAGS)}))",
            holds=lambda it: all(arg.partition("=")[0] not in OWNED_FLAGS for arg in it),
            message=f"must not contain a flag that the operator sets from the other fields ({', '.join(OWNED_FLAGS)}): "
            "set that field instead",
        ),
    ] = Field(
        default=(),
        description="More flags for `octavo serve`, each as --flag or --flag=value. Flags that follow from other "
        "fields are refused.",
    )


class KeySecret(Model):
    """API keys in a Secret of this namespace."""

    name: ObjectName = Field(description="The Secret's name.")
    key: DataKey = Field(default="key", description="Under which key of the Secret the API keys are, one a line.")


class EndpointSpec(Model):
    """How clients reach the model."""

    port: int = Field(default=80, ge=1, le=65535, description="The port of the Service.")
    api_key_secret: KeySecret | None = Field(
        default=None,
        description="Who sends none of these keys is refused; health, readiness and metrics stay open. A change of the "
        "Secret takes effect without a restart. Default: no key is needed.",
    )
    allow_from: (
        Annotated[
            ListOf[Peer], Field(min_length=1, max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
        ]
        | None
    ) = Field(
        default=None,
        description="Who may reach the pods, as a NetworkPolicy says it; metrics come from the same port, so name "
        "Prometheus too. Default: the pods of all namespaces. Takes a network plugin that enforces NetworkPolicies.",
    )


class RolloutSpec(Model):
    """How pods are replaced."""

    strategy: Literal["auto", "surge", "replace"] = Field(
        default="auto",
        description="surge: a new pod comes before an old one goes. replace: an old one goes first. auto: surge, and "
        "replace where the new pod waits for GPUs that the old ones hold. A ReadWriteOnce cache means replace.",
    )
    drain_seconds: int = Field(
        default=300,
        ge=0,
        le=86_400,
        description="How long a pod that is to end may take to finish the requests that it is running.",
    )


class InferenceServiceSpec(Model):
    """What to serve, on what, and how many times."""

    rules: ClassVar = (
        Rule(
            cel="self.rollout.strategy != 'surge' || !has(self.model.cache) || !has(self.model.cache.size) || "
            "has(self.model.cache.accessMode) && self.model.cache.accessMode == 'ReadWriteMany'",
            holds=lambda it: (
                it.rollout.strategy != "surge" or it.model.cache is None or not it.model.cache.is_for_one_pod
            ),
            message="rollout.strategy surge needs a volume that two pods can have: set model.cache.accessMode to "
            "ReadWriteMany",
        ),
        Rule(
            cel="!(has(self.replicas) && has(self.autoscaling))",
            holds=lambda it: it.replicas is None or it.autoscaling is None,
            message="replicas and autoscaling exclude each other: remove one of them",
        ),
        Rule(
            cel="!has(self.autoscaling) || self.autoscaling.metric != 'cpu' || has(self.resources) && "
            "(has(self.resources.requests) && has(self.resources.requests.cpu) || "
            "has(self.resources.limits) && has(self.resources.limits.cpu))",
            holds=lambda it: (
                it.autoscaling is None
                or it.autoscaling.metric != "cpu"
                or bool(it.resources.requests.cpu or it.resources.limits.cpu)
            ),
            message="autoscaling by cpu measures the share of the CPU that a pod requests: set resources.requests.cpu",
        ),
        Rule(
            cel="!has(self.model.cache) || !has(self.model.cache.size) || "
            "has(self.model.cache.accessMode) && self.model.cache.accessMode == 'ReadWriteMany' || "
            "(has(self.autoscaling) ? self.autoscaling.maxReplicas <= 1 : !has(self.replicas) || self.replicas <= 1)",
            holds=lambda it: it.model.cache is None or not it.model.cache.is_for_one_pod or (it.max_replicas or 1) <= 1,
            message="model.cache is ReadWriteOnce, which is for one replica: set model.cache.accessMode to "
            "ReadWriteMany, or replicas (autoscaling.maxReplicas) to 1",
        ),
        Rule(
            cel="self.engine.device != 'cuda' || self.accelerator.type == 'nvidia'",
            holds=lambda it: it.engine.device != "cuda" or it.accelerator.type == "nvidia",
            message="engine.device cuda needs GPUs: set accelerator.type to nvidia and accelerator.count",
        ),
        Rule(
            cel="!has(self.engine.gpuMemoryUtilization) || "
            "self.accelerator.type == 'nvidia' && self.engine.device != 'cpu'",
            holds=lambda it: it.engine.gpu_memory_utilization is None or it.device == "cuda",
            message="engine.gpuMemoryUtilization is for GPUs: leave it out; on CPU set resources.limits.memory",
        ),
        Rule(
            cel="!has(self.accelerator.product) || !has(self.pod) || !has(self.pod.nodeSelector) || "
            f"!('{names.GPU_PRODUCT_LABEL}' in self.pod.nodeSelector)",
            holds=lambda it: it.accelerator.product is None or names.GPU_PRODUCT_LABEL not in it.pod.node_selector,
            message=f"accelerator.product sets {names.GPU_PRODUCT_LABEL}: remove it from pod.nodeSelector",
        ),
        Rule(
            cel="!has(self.pod) || !has(self.pod.env) || !(has(self.model.credentialsSecret) || "
            "has(self.adapters) && self.adapters.exists(one, has(one.credentialsSecret))) || "
            f"self.pod.env.all(one, !(one.name in {cel_list(AWS_KEYS)}))",
            holds=lambda it: (
                all(one.credentials_secret is None for one in (it.model, *it.adapters))
                or all(one.name not in AWS_KEYS for one in it.pod.env)
            ),
            message=f"credentialsSecret sets {', '.join(AWS_KEYS)}: remove them from pod.env",
        ),
        Rule(
            cel="!has(self.adapters) || size(self.adapters) == 0 || !has(self.accelerator.count) || "
            "self.accelerator.count == 1",
            holds=lambda it: not it.adapters or it.accelerator.tensor_parallel_size == 1,
            message="adapters are not split over GPUs: set accelerator.count to 1, or remove adapters",
        ),
    )

    model: ModelSpec = Field(description="Which model to serve.")
    accelerator: AcceleratorSpec = Field(default=AcceleratorSpec(), description="The hardware of each replica.")
    replicas: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None,
        description="How many pods serve the model; 0 suspends the service. Default: 1, which the scale subresource "
        "cannot see: set it before a tool scales the service; or the number that an autoscaler has left. Excludes "
        "autoscaling.",
    )
    autoscaling: AutoscalingSpec | None = Field(
        default=None, description="Lets the number of replicas follow the load. Excludes replicas."
    )
    engine: EngineSpec = Field(default=EngineSpec(), description="How the engine runs the model.")
    profiles: Profiles = Field(
        default=(),
        description="More names for the same weights, each with a system message, parameters and messages of its own, "
        "as in a Modelfile. A change takes effect in about a minute; only the first one that comes and the last one "
        "that goes replace pods.",
    )
    adapters: Adapters = Field(
        default=(),
        description="LoRA adapters, each served beside the model under a name of its own. A change replaces the pods. "
        "For ranks above 16 add --max-lora-rank=N to engine.extraArgs.",
    )
    endpoint: EndpointSpec = Field(default=EndpointSpec(), description="How clients reach the model.")
    rollout: RolloutSpec = Field(default=RolloutSpec(), description="How pods are replaced.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="CPU, memory and disk of each pod.")
    pod: PodSettings = Field(default=PodSettings(), description="What else the pods need on this cluster.")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What computes."""
        if self.engine.device != "auto":
            return self.engine.device
        return "cuda" if self.accelerator.type == "nvidia" else "cpu"

    @property
    def max_replicas(self) -> int | None:
        """How many replicas there may be; None: the default, one."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


class ObjectMeta(Model):
    """The part of an object's metadata that Octavo reads. The rest is Kubernetes' own business and dropped."""

    name: str
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _drop_the_rest(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias for field in cls.model_fields.values()}
        return {key: value for key, value in data.items() if key in known}


class InferenceService(Model):
    """A model that is served over an OpenAI-compatible HTTP API."""

    rules: ClassVar = (
        Rule(
            cel="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            holds=lambda it: re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", it.metadata.name) is not None,
            message="metadata.name must be a Service's name: lower-case letters, digits and '-', a letter first",
        ),
        Rule(
            cel=f"size(self.metadata.name) <= {names.MAX_NAME_LENGTH}",
            holds=lambda it: len(it.metadata.name) <= names.MAX_NAME_LENGTH,
            message=f"metadata.name must have at most {names.MAX_NAME_LENGTH} characters: pod names are made from it",
        ),
        Rule(
            cel="!has(self.spec.profiles) || self.spec.profiles.all(one, "
            "one.name != (has(self.spec.model.name) ? self.spec.model.name : self.metadata.name))",
            holds=lambda it: all(one.name != it.served_model_name for one in it.spec.profiles),
            message="spec.profiles must not have the name of the model itself (spec.model.name, else metadata.name): "
            "give that profile another name",
        ),
        Rule(
            cel="!has(self.spec.adapters) || self.spec.adapters.all(one, "
            "one.name != (has(self.spec.model.name) ? self.spec.model.name : self.metadata.name) && "
            "!(has(self.spec.profiles) && self.spec.profiles.exists(other, other.name == one.name)))",
            holds=lambda it: (
                not {one.name for one in it.spec.adapters}
                & {it.served_model_name, *(one.name for one in it.spec.profiles)}
            ),
            message="spec.adapters must not have the name of the model itself (spec.model.name, else metadata.name) or "
            "of a profile: give that adapter another name",
        ),
    )

    api_version: Literal["serving.octavo.dev/v1alpha1"]
    kind: Literal["InferenceService"]
    metadata: ObjectMeta
    spec: InferenceServiceSpec
    status: InferenceServiceStatus = InferenceServiceStatus()

    @property
    def name(self) -> str:
        """The object's name, which its children share."""
        return self.metadata.name

    @property
    def served_model_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.spec.model.name or self.metadata.name
