"""One table of good and bad InferenceServices, judged three times: by the models, by the schema, by a real API server.

The models run in `kubectl octavo render` and in the operator, the schema and its CEL rules in the API server. They come
from one source (octavo_operator/api), and here it shows that they agree.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import yaml
from jsonschema import Draft4Validator

from octavo_cluster.apiserver import ApiServer
from octavo_operator import names
from octavo_operator.api.crd import custom_resource_definition
from octavo_operator.cli import read
from octavo_operator.errors import SpecInvalid

ROOT: Final = Path(__file__).parents[2]
REMOVED: Final = object()  # in a change: leave the field out

Document = dict[str, Any]


def service(change: Document | None = None) -> Document:
    """A minimal InferenceService with `change` merged into it."""
    base: Document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "llama"},
        "spec": {"model": {"source": "pvc://models/llama.gguf"}},
    }
    return _merge(base, change or {})


def _merge(base: Document, change: Document) -> Document:
    merged = copy.deepcopy(base)
    for key, value in change.items():
        if value is REMOVED:
            del merged[key]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def source(text: str | None) -> Document:
    return {"model": {"source": text}}


def cached(cache: Document) -> Document:
    return {"model": {"source": "https://models.example/model.gguf", "cache": cache}}


def pod(**settings: Any) -> Document:
    return {"pod": settings}


GPU: Final = {"type": "nvidia", "count": 2}
CPU_REQUEST: Final = {"resources": {"requests": {"cpu": "1"}}}

GOOD: Final[dict[str, Document]] = {
    "nothing but a source": service(),
    "a file deep in a volume": service({"spec": source("pvc://my.models/llama-3/q4_0/model.v2+fixed.gguf")}),
    "Hugging Face": service({"spec": source("hf://org/Some_Repo-GGUF:model.Q8_0.gguf")}),
    "Hugging Face with revision and folder": service({"spec": source("hf://org/repo@refs/pr/1:gguf/model.gguf")}),
    "a web server": service({"spec": source("https://models.example:8443/~octavo/a%20b/model.gguf")}),
    "a served name with slash and colon": service({"spec": {"model": {"name": "meta-llama/Llama-3.1:8b"}}}),
    "the longest name": service({"metadata": {"name": "a" * names.MAX_NAME_LENGTH}}),
    "a field left empty": service({"spec": {"replicas": None, "accelerator": {"type": None}, "pod": None}}),
    "suspended": service({"spec": {"replicas": 0}}),
    "two GPUs": service({"spec": {"accelerator": GPU}}),
    "one kind of GPU": service({"spec": {"accelerator": {**GPU, "product": "NVIDIA-H100-80GB-HBM3"}}}),
    "autoscaling with a CPU request": service({"spec": {"autoscaling": {"maxReplicas": 3}, **CPU_REQUEST}}),
    "autoscaling with a CPU limit": service(
        {
            "spec": {
                "autoscaling": {"minReplicas": 3, "maxReplicas": 3, "metric": "cpu", "target": "120"},
                "resources": {"limits": {"cpu": 2}},
            }
        }
    ),
    "autoscaling at a pace of its own": service(
        {
            "spec": {
                "autoscaling": {
                    "maxReplicas": 3,
                    "behavior": {
                        "scaleUp": {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]},
                        "scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Min"},
                    },
                },
                **CPU_REQUEST,
            }
        }
    ),
    "quantities as numbers and in every size": service(
        {"spec": {"resources": {"requests": {"cpu": 1, "memory": "1.5Gi"}, "limits": {"cpu": "1000m", "memory": "2G"}}}}
    ),
    "a flag that the operator does not own": service(
        {"spec": {"engine": {"extraArgs": ["--seed=1", "--device-map", "--note=a = b, c"]}}}
    ),
    "who may reach it": service(
        {
            "spec": {
                "endpoint": {
                    "allowFrom": [
                        {"podSelector": {}, "namespaceSelector": {}},
                        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["chat"]}]}},
                        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
                        {"ipBlock": {"cidr": "10.0.0.0/8"}},
                        {"ipBlock": {"cidr": "2001:db8::/64"}},
                    ]
                }
            }
        }
    ),
    "the CPU beside GPUs": service({"spec": {"accelerator": GPU, "engine": {"device": "cpu"}}}),
    "half of a GPU": service(
        {"spec": {"accelerator": GPU, "engine": {"device": "cuda", "gpuMemoryUtilization": "0.5"}}}
    ),
    "keys for clients": service({"spec": {"endpoint": {"apiKeySecret": {"name": "keys"}}}}),
    "variables and zones": service(
        {
            "spec": pod(
                env=[
                    {"name": "A", "value": ""},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                    {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "s", "key": "k"}}},
                ],
                topologySpreadConstraints=[
                    {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"},
                    {"topologyKey": "kubernetes.io/hostname"},
                ],
            )
        }
    ),
    "a gated model in a cache": service(
        {
            "spec": {
                "model": {
                    "source": "hf://org/repo:model.gguf",
                    "tokenSecret": {"name": "hub", "key": "read.token"},
                    "cache": {"size": "40Gi", "storageClassName": "fast"},
                },
                "replicas": 1,
            }
        }
    ),
    "a cache for many": service(
        {"spec": {"replicas": 4, **cached({"size": 10**12, "accessMode": "ReadWriteMany"})}},
    ),
    "a cache that is there": service({"spec": {"replicas": 4, **cached({"claimName": "models"})}}),
    "a cache and an autoscaler": service(
        {"spec": {"autoscaling": {"maxReplicas": 1}, **CPU_REQUEST, **cached({"size": "1Gi"})}}
    ),
    "everything at once": service(
        {
            "spec": {
                "model": {"name": "llama"},
                "accelerator": {**GPU, "product": "Tesla-T4"},
                "replicas": 2,
                "engine": {"image": "registry.example:5000/octavo@sha256:0123", "dtype": "bfloat16", "maxNumSeqs": 8},
                "endpoint": {"port": 8080},
                "rollout": {"drainSeconds": 0},
                "resources": {"requests": {"ephemeral-storage": "10Gi"}, "limits": {"ephemeral-storage": "20Gi"}},
                "pod": {
                    "nodeSelector": {"example.com/pool": "gpu", "empty": ""},
                    "tolerations": [
                        {"operator": "Exists"},
                        {"key": "team", "value": "a", "effect": "NoExecute", "tolerationSeconds": 30},
                    ],
                    "labels": {"team": "a"},
                    "annotations": {"example.com/note": "anything: {{ at all }}"},
                    "imagePullSecrets": [{"name": "one"}, {"name": "two"}],
                    "priorityClassName": "high",
                    "runtimeClassName": "nvidia",
                },
            }
        }
    ),
}


@dataclass(frozen=True)
class Bad:
    """A manifest that must be refused."""

    what: str
    change: Document  # merged into the good minimum
    says: str  # part of the API server's sentence
    field: str | None = None  # which is said to be wrong; None: the sentence names it itself
    by: Literal["schema", "rule"] = "rule"  # rule: plain OpenAPI would let it pass, only CEL refuses it
    model_says: str | None = None  # part of pydantic's sentence, where that is its own


def bad_spec(what: str, change: Document, field: str, says: str, **more: Any) -> Bad:
    return Bad(what, {"spec": change}, says, f"spec.{field}", **more)


def unknown(what: str, change: Document, field: str) -> Bad:
    return bad_spec(what, change, field, "unknown field", by="schema")


def at_least(change: Document, field: str, bound: int) -> Bad:
    says = f"should be greater than or equal to {bound}"
    return bad_spec(f"{field} below {bound}", change, field, says, by="schema")


def at_most(change: Document, field: str, bound: int) -> Bad:
    says = f"should be less than or equal to {bound}"
    return bad_spec(f"{field} above {bound}", change, field, says, by="schema")


def one_of(change: Document, field: str, values: list[str]) -> Bad:
    says = "supported values: " + ", ".join(f'"{value}"' for value in values)
    return bad_spec(f"an unknown {field}", change, field, says, by="schema", model_says="Input should be ")


def bad_source(what: str, text: str, says: str) -> Bad:
    return bad_spec(what, source(text), "model.source", says)


PACE: Final = "autoscaling.behavior.scaleDown"


def paced(rules: Document) -> Document:
    return {"autoscaling": {"maxReplicas": 3, "behavior": {"scaleDown": rules}}, **CPU_REQUEST}


def allow(peer: Document, field: str, says: str) -> Bad:
    path = f"endpoint.allowFrom[0]{field}"
    return bad_spec(f"{path}: {json.dumps(peer)}", {"endpoint": {"allowFrom": [peer]}}, path, says)


def engine_args(*args: str) -> Document:
    return {"engine": {"extraArgs": list(args)}}


OWNED_FLAG: Final = "must not contain a flag that the operator sets"
SCHEMES: Final = "must start with pvc://, hf:// or https://"
DOTS: Final = "must not contain the path segments '.' or '..'"
PVC_FORM: Final = "must have the form pvc://CLAIM/PATH/FILE.gguf"
HF_FORM: Final = "must have the form hf://ORG/REPO[@REVISION]:FILE.gguf"
HTTPS_FORM: Final = "must have the form https://HOST/PATH/FILE.gguf"
SERVED_NAME: Final = "must be letters, digits and - . _ : /"
PERCENTAGE: Final = 'must be a percentage from 1 to 999 in quotes, such as "80"'
QUANTITY: Final = "must be a quantity such as 500m, 2 or 16Gi"
CACHE: Final = "must have either size, for a volume of this service's own, or claimName"
PEER: Final = "must have either ipBlock or podSelector, namespaceSelector or both"
LABEL_KEY: Final = "every key must have the form of a label key"
LABEL_VALUE: Final = "must be a label value"

BAD: Final = (
    # names
    Bad("a name with a dot", {"metadata": {"name": "llama.v2"}}, "metadata.name must be a Service's name"),
    Bad("a name that starts with a digit", {"metadata": {"name": "3llama"}}, "metadata.name must be a Service's name"),
    Bad(
        "a name without room for those of its pods",
        {"metadata": {"name": "a" * (names.MAX_NAME_LENGTH + 1)}},
        "metadata.name must have at most 46 characters",
    ),
    # typos and types
    Bad("no spec", {"spec": REMOVED}, "Required value", "spec", by="schema", model_says="Field required"),
    unknown("a typo", {"replcas": 2}, "replcas"),
    unknown("a typo further down", {"engine": {"maxModelLength": 4096}}, "engine.maxModelLength"),
    unknown(
        "a GPU among the limits", {"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources.limits.nvidia.com/gpu"
    ),
    bad_spec(
        "nothing where something must be",
        source(None),
        "model.source",
        "Required value",
        by="schema",
        model_says="Field required",
    ),
    bad_spec(
        "a number in quotes",
        {"replicas": "2"},
        "replicas",
        "must be of type integer",
        by="schema",
        model_says="valid integer",
    ),
    bad_spec(
        "half a replica",
        {"replicas": 1.5},
        "replicas",
        "must be of type integer",
        by="schema",
        model_says="valid integer",
    ),
    # model
    Bad(
        "no model",
        {"spec": {"model": REMOVED}},
        "Required value",
        "spec.model",
        by="schema",
        model_says="Field required",
    ),
    Bad(
        "no source",
        {"spec": {"model": {"source": REMOVED}}},
        "Required value",
        "spec.model.source",
        by="schema",
        model_says="Field required",
    ),
    bad_spec(
        "an empty source",
        source(""),
        "model.source",
        "should be at least 1 chars long",
        by="schema",
        model_says="at least 1 character",
    ),
    bad_spec(
        "an endless source",
        source(f"pvc://models/{'a' * 1024}.gguf"),
        "model.source",
        "may not be more than 1024",
        by="schema",
        model_says="at most 1024 characters",
    ),
    bad_source("an unknown scheme", "s3://bucket/model.gguf", SCHEMES),
    bad_source("plain http", "http://example.com/model.gguf", SCHEMES),
    bad_source("a path", "/models/model.gguf", SCHEMES),
    bad_source("a source that looks like a flag", "--output=/etc/passwd", SCHEMES),
    bad_source("a claim without a file", "pvc://models", PVC_FORM),
    bad_source("a claim whose name cannot be", "pvc://Models/model.gguf", PVC_FORM),
    bad_source("another kind of file", "pvc://models/model.safetensors", PVC_FORM),
    bad_source("a way out of the volume", "pvc://models/../../etc/model.gguf", DOTS),
    bad_source("a dot in the path", "pvc://models/./model.gguf", DOTS),
    bad_source("a blank in the path", "pvc://models/model.gguf --port=1.gguf", PVC_FORM),
    bad_source("a second line", "pvc://models/model.gguf\n", PVC_FORM),
    bad_source("a repository without a file", "hf://org/repo", HF_FORM),
    bad_source("a file without a repository", "hf://repo:model.gguf", HF_FORM),
    bad_source("a way out of the repository", "hf://org/repo:../model.gguf", DOTS),
    bad_source("a password in the URL", "https://me:secret@example.com/model.gguf", HTTPS_FORM),
    bad_source("a query in the URL", "https://example.com/model.gguf?download=true", HTTPS_FORM),
    bad_spec("a served name with a blank", {"model": {"name": "my model"}}, "model.name", SERVED_NAME),
    bad_spec("a served name that looks like a flag", {"model": {"name": "--port=1"}}, "model.name", SERVED_NAME),
    bad_spec(
        "a token for a web server",
        {"model": {"source": "https://models.example/a.gguf", "tokenSecret": {"name": "a"}}},
        "model",
        "tokenSecret is a token for Hugging Face",
    ),
    bad_spec(
        "a Secret's key with a blank",
        {"model": {"source": "hf://a/b:c.gguf", "tokenSecret": {"name": "a", "key": "my token"}}},
        "model.tokenSecret.key",
        "must be a key of a Secret or ConfigMap",
    ),
    bad_spec("a cache of a volume", {"model": {"cache": {"size": "1Gi"}}}, "model", "leave cache out"),
    bad_spec("a cache of nothing", cached({}), "model.cache", CACHE),
    bad_spec("a cache of two volumes", cached({"size": "1Gi", "claimName": "a"}), "model.cache", CACHE),
    bad_spec("a cache without room", cached({"size": "0"}), "model.cache", "size must be greater than 0"),
    bad_spec(
        "a class for a claim that is there",
        cached({"claimName": "a", "storageClassName": "fast"}),
        "model.cache",
        "are those of the claim that claimName names",
    ),
    one_of(
        cached({"size": "1Gi", "accessMode": "ReadOnlyMany"}),
        "model.cache.accessMode",
        ["ReadWriteOnce", "ReadWriteMany"],
    ),
    *(
        Bad(
            f"a volume for one pod and more pods: {', '.join(more)}",
            {"spec": {**cached({"size": "1Gi"}), **more}},
            "model.cache is ReadWriteOnce, which is for one replica",
            "spec",
        )
        for more in ({"replicas": 2}, {"autoscaling": {"maxReplicas": 2}, **CPU_REQUEST})
    ),
    # accelerator
    one_of({"accelerator": {"type": "tpu"}}, "accelerator.type", ["cpu", "nvidia"]),
    bad_spec("GPUs without a number", {"accelerator": {"type": "nvidia"}}, "accelerator", "type nvidia needs count"),
    bad_spec("a number without GPUs", {"accelerator": {"count": 2}}, "accelerator", "count is a number of GPUs"),
    bad_spec(
        "a product without GPUs", {"accelerator": {"product": "Tesla-T4"}}, "accelerator", "product is a model of GPU"
    ),
    at_least({"accelerator": {"type": "nvidia", "count": -1}}, "accelerator.count", 1),
    at_most({"accelerator": {"type": "nvidia", "count": 17}}, "accelerator.count", 16),
    bad_spec(
        "a product with a blank", {"accelerator": {**GPU, "product": "Tesla T4"}}, "accelerator.product", LABEL_VALUE
    ),
    Bad(
        "a product said twice",
        {
            "spec": {
                "accelerator": {**GPU, "product": "Tesla-T4"},
                **pod(nodeSelector={"nvidia.com/gpu.product": "Tesla-T4"}),
            }
        },
        "accelerator.product sets nvidia.com/gpu.product: remove it from pod.nodeSelector",
        "spec",
    ),
    # replicas and autoscaling
    at_least({"replicas": -1}, "replicas", 0),
    at_most({"replicas": 1001}, "replicas", 1000),
    Bad(
        "replicas beside autoscaling",
        {"spec": {"replicas": 2, "autoscaling": {"maxReplicas": 3}, **CPU_REQUEST}},
        "replicas and autoscaling exclude each other: remove one of them",
        "spec",
    ),
    Bad(
        "autoscaling by a share of nothing",
        {"spec": {"autoscaling": {"maxReplicas": 3}}},
        "set resources.requests.cpu",
        "spec",
    ),
    bad_spec(
        "autoscaling without a maximum",
        {"autoscaling": {"minReplicas": 1}, **CPU_REQUEST},
        "autoscaling.maxReplicas",
        "Required value",
        by="schema",
        model_says="Field required",
    ),
    bad_spec(
        "a minimum above the maximum",
        {"autoscaling": {"minReplicas": 4, "maxReplicas": 3}, **CPU_REQUEST},
        "autoscaling",
        "minReplicas must not be greater than maxReplicas",
    ),
    at_least({"autoscaling": {"minReplicas": 0, "maxReplicas": 3}, **CPU_REQUEST}, "autoscaling.minReplicas", 1),
    at_most(paced({"stabilizationWindowSeconds": 3601}), f"{PACE}.stabilizationWindowSeconds", 3600),
    at_least(paced({"policies": [{"type": "Pods", "value": 0, "periodSeconds": 1}]}), f"{PACE}.policies[0].value", 1),
    one_of(paced({"selectPolicy": "Mean"}), f"{PACE}.selectPolicy", ["Max", "Min", "Disabled"]),
    one_of({"autoscaling": {"maxReplicas": 3, "metric": "queue"}, **CPU_REQUEST}, "autoscaling.metric", ["cpu"]),
    *(
        bad_spec(
            f"the target {target!r}",
            {"autoscaling": {"maxReplicas": 3, "target": target}, **CPU_REQUEST},
            "autoscaling.target",
            PERCENTAGE,
        )
        for target in ("0", "80%", "")
    ),
    bad_spec(
        "a target that is a number",
        {"autoscaling": {"maxReplicas": 3, "target": 80}, **CPU_REQUEST},
        "autoscaling.target",
        "must be of type string",
        by="schema",
        model_says="valid string",
    ),
    # engine
    one_of({"engine": {"device": "gpu"}}, "engine.device", ["auto", "cpu", "cuda"]),
    one_of({"engine": {"quantization": "awq"}}, "engine.quantization", ["auto", "none"]),
    Bad("CUDA without GPUs", {"spec": {"engine": {"device": "cuda"}}}, "engine.device cuda needs GPUs", "spec"),
    *(
        Bad(
            f"a share of no GPU: {what}",
            {"spec": {"engine": {"gpuMemoryUtilization": "0.9", **engine}, "accelerator": accelerator}},
            "engine.gpuMemoryUtilization is for GPUs",
            "spec",
        )
        for what, engine, accelerator in (("no GPU", {}, {"type": "cpu"}), ("none used", {"device": "cpu"}, GPU))
    ),
    *(
        bad_spec(
            f"the share {share!r}",
            {"accelerator": GPU, "engine": {"gpuMemoryUtilization": share}},
            "engine.gpuMemoryUtilization",
            "must be a share above 0 and up to 1",
        )
        for share in ("0", "0.0", "1.1", "90%", "")
    ),
    one_of({"engine": {"dtype": "int8"}}, "engine.dtype", ["auto", "float32", "bfloat16", "float16"]),
    at_least({"engine": {"maxModelLen": 0}}, "engine.maxModelLen", 1),
    at_least({"engine": {"maxNumSeqs": 0}}, "engine.maxNumSeqs", 1),
    bad_spec("an image with a blank", {"engine": {"image": "a b"}}, "engine.image", "must be an image reference"),
    bad_spec("an owned flag", engine_args("--port"), "engine.extraArgs", OWNED_FLAG),
    bad_spec("a key on the command line", engine_args("--api-key=secret"), "engine.extraArgs", OWNED_FLAG),
    bad_spec("an owned flag with its value", engine_args("--seed=1", "--device=cpu"), "engine.extraArgs", OWNED_FLAG),
    bad_spec("a flag of another field", engine_args("--max-model-len=1"), "engine.extraArgs", OWNED_FLAG),
    bad_spec(
        "a value apart from its flag", engine_args("--seed", "1"), "engine.extraArgs[1]", "--flag or --flag=value"
    ),
    bad_spec("a short flag", engine_args("-v"), "engine.extraArgs[0]", "--flag or --flag=value"),
    bad_spec("two lines in a flag", engine_args("--a=1\n--port=1"), "engine.extraArgs[0]", "--flag or --flag=value"),
    bad_spec(
        "a crowd of flags",
        engine_args(*["--seed=1"] * 33),
        "engine.extraArgs",
        "must have at most 32 items",
        by="schema",
        model_says="should have at most 32 items",
    ),
    # endpoint, rollout, resources
    at_least({"endpoint": {"port": 0}}, "endpoint.port", 1),
    at_most({"endpoint": {"port": 65536}}, "endpoint.port", 65535),
    bad_spec(
        "an endpoint that nobody may reach",
        {"endpoint": {"allowFrom": []}},
        "endpoint.allowFrom",
        "should have at least 1 items",
        by="schema",
        model_says="at least 1 item",
    ),
    allow({}, "", PEER),
    allow({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}, "", PEER),
    allow({"podSelector": {"matchLabels": {"my app": "a"}}}, ".podSelector.matchLabels", LABEL_KEY),
    allow(
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
        ".podSelector.matchExpressions[0]",
        "operator In and NotIn need values",
    ),
    allow(
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
        ".podSelector.matchExpressions[0]",
        "Exists and DoesNotExist take none",
    ),
    *(
        allow({"ipBlock": {"cidr": block}}, ".ipBlock.cidr", "must be a range of addresses such as 10.0.0.0/8")
        for block in ("10.0.0.0", "10.0.0.256/8", "10.0.0.0/33", "localhost/8")
    ),
    one_of({"rollout": {"strategy": "recreate"}}, "rollout.strategy", ["auto", "surge", "replace"]),
    Bad(
        "two pods with a volume for one",
        {"spec": {**cached({"size": "1Gi"}), "rollout": {"strategy": "surge"}}},
        "rollout.strategy surge needs a volume that two pods can have",
        "spec",
    ),
    at_least({"rollout": {"drainSeconds": -1}}, "rollout.drainSeconds", 0),
    bad_spec("memory in words", {"resources": {"requests": {"memory": "lots"}}}, "resources.requests.memory", QUANTITY),
    bad_spec("negative CPU", {"resources": {"limits": {"cpu": -1}}}, "resources.limits.cpu", QUANTITY),
    bad_spec(
        "a fraction of a core without quotes",
        {"resources": {"limits": {"cpu": 0.5}}},
        "resources.limits.cpu",
        "must be of type integer",
        by="schema",
        model_says="valid string",
    ),
    *(
        bad_spec(
            f"a request of {what} above its limit",
            {"resources": {"requests": {what: request}, "limits": {what: limit}}},
            "resources",
            f"requests of {what} must not be greater than its limits",
        )
        for what, request, limit in (
            ("cpu", 2, "1999m"),
            ("memory", "1Gi", "1G"),
            ("ephemeral-storage", "1024Ki", "1M"),
        )
    ),
    # pod
    *(
        bad_spec(
            f"the label {key}", pod(labels={key: "x"}), "pod.labels", "must not contain a label that the operator sets"
        )
        for key in ("serving.octavo.dev/service", "app.kubernetes.io/component", "pod-template-hash")
    ),
    bad_spec("a label key with a blank", pod(labels={"my team": "a"}), "pod.labels", LABEL_KEY),
    bad_spec("a label value with a blank", pod(labels={"team": "a b"}), "pod.labels", LABEL_VALUE),
    bad_spec("an annotation without a name", pod(annotations={"example.com/": "a"}), "pod.annotations", LABEL_KEY),
    bad_spec(
        "a crowd of node labels",
        pod(nodeSelector={f"label-{i}": "x" for i in range(17)}),
        "pod.nodeSelector",
        "must have at most 16 items",
        by="schema",
        model_says="should have at most 16 items",
    ),
    bad_spec("a toleration of nothing", pod(tolerations=[{"value": "a"}]), "pod.tolerations[0]", "Equal needs a key"),
    bad_spec(
        "a toleration of everything with a value",
        pod(tolerations=[{"operator": "Exists", "value": "a"}]),
        "pod.tolerations[0]",
        "operator Exists takes no value",
    ),
    bad_spec(
        "a toleration for a time of what evicts nobody",
        pod(tolerations=[{"operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 3}]),
        "pod.tolerations[0]",
        "tolerationSeconds needs effect NoExecute",
    ),
    bad_spec(
        "a Secret named twice",
        pod(imagePullSecrets=[{"name": "a"}, {"name": "a"}]),
        "pod.imagePullSecrets",
        "Duplicate value",
        model_says="must name each Secret once",
    ),
    *(
        bad_spec(f"the variable {json.dumps(variable)}", pod(env=[variable]), f"pod.env[0]{field}", says)
        for variable, field, says in (
            ({"name": "A"}, "", "must have either value or valueFrom"),
            ({"name": "A B", "value": ""}, ".name", "must be letters, digits and '_'"),
            ({"name": "HF_TOKEN", "value": "hf_secret"}, "", "HF_TOKEN is set by model.tokenSecret"),
            ({"name": "A", "valueFrom": {}}, ".valueFrom", "must have either secretKeyRef or configMapKeyRef"),
        )
    ),
    bad_spec(
        "a variable set twice",
        pod(env=[{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]),
        "pod.env",
        "Duplicate value",
        model_says="must name each variable once",
    ),
    bad_spec(
        "a zone named twice",
        pod(topologySpreadConstraints=[{"topologyKey": "zone"}, {"topologyKey": "zone", "maxSkew": 2}]),
        "pod.topologySpreadConstraints",
        "Duplicate value",
        model_says="must name each topologyKey once",
    ),
    bad_spec(
        "a priority class that cannot be",
        pod(priorityClassName="High"),
        "pod.priorityClassName",
        "must be the name of an",
    ),
)


def by_name(bad: Bad) -> str:
    return bad.what


@pytest.fixture(params=GOOD.values(), ids=list(GOOD))
def good(request: pytest.FixtureRequest) -> Document:
    document: Document = request.param
    return document


@pytest.fixture(params=BAD, ids=by_name)
def bad(request: pytest.FixtureRequest) -> Bad:
    sample: Bad = request.param
    return sample


# The models


def test_the_models_take_what_is_good(good: Document) -> None:
    assert read(good).name == good["metadata"]["name"]


def test_the_models_refuse_what_is_bad_and_name_the_field(bad: Bad) -> None:
    with pytest.raises(SpecInvalid) as refusal:
        read(service(bad.change))
    findings = str(refusal.value).splitlines()[1:]
    says = bad.says if bad.model_says is None else bad.model_says
    path = "" if bad.field is None else re.escape(bad.field) + "[:.[]"
    assert any(re.match(f"  {path}", finding) and says in finding for finding in findings), findings


# The schema


def strict_json_schema(schema: Document) -> Document:
    """Plain JSON Schema for what OpenAPI and strict field validation say together; CEL is left out."""
    strict = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if "properties" in schema:
        children = {name: strict_json_schema(child) for name, child in schema["properties"].items()}
        optional = children.keys() - schema.get("required", [])
        strict["properties"] = children | {name: {"anyOf": [children[name], {"type": "null"}]} for name in optional}
        strict["additionalProperties"] = False
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            strict[keyword] = strict_json_schema(schema[keyword])
    return strict


@pytest.fixture(scope="module")
def schema() -> Draft4Validator:
    version = custom_resource_definition()["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    return Draft4Validator(strict_json_schema(root))


def test_the_schema_takes_what_is_good(schema: Draft4Validator, good: Document) -> None:
    assert [error.message for error in schema.iter_errors(good)] == []


def test_the_schema_refuses_what_needs_no_rule(schema: Draft4Validator, bad: Bad) -> None:
    refused = not schema.is_valid(service(bad.change))
    assert refused == (bad.by == "schema")


# The API server


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    api_server.kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    api_server.kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
    return api_server


def dry_run(server: ApiServer, document: Document) -> str:
    """What the API server's strict validation says of a manifest; nothing, if it takes it."""
    answer = server.kubectl(
        "create", "--dry-run=server", "--validate=strict", "--filename=-", input=json.dumps(document), check=False
    )
    return "" if answer.returncode == 0 else answer.stderr


@pytest.mark.apiserver
def test_the_api_server_takes_what_is_good(server: ApiServer, good: Document) -> None:
    assert dry_run(server, good) == ""


@pytest.mark.apiserver
def test_the_api_server_refuses_what_is_bad_and_names_the_field(server: ApiServer, bad: Bad) -> None:
    answer = dry_run(server, service(bad.change))
    assert bad.says in answer
    assert bad.field is None or bad.field in answer
    assert answer != ""


@pytest.mark.apiserver
@pytest.mark.parametrize("path", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_takes_the_shipped_samples(server: ApiServer, path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert dry_run(server, document) == ""
