"""The Deployment that runs the engine.

Called by desired.children; pure. Here the resource becomes the engine's command line: everything that a user wrote is
passed as `--flag=value`, so that no value can be read as another flag.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from octavo_operator import names
from octavo_operator.api import source
from octavo_operator.api.model import AWS_KEYS, ModelSpec
from octavo_operator.api.v1alpha1 import InferenceService, KeySecret
from octavo_operator.desired.metadata import Manifest, object_meta
from octavo_operator.desired.profiles import FILE_NAME as PROFILES_FILE

MODEL_DIR: Final = "/models"
PULLED_FILE: Final = "model.gguf"
PULLED_MODEL: Final = "model"  # of what may be a file or a folder
PROFILES_DIR: Final = "/etc/octavo/profiles"
API_KEY_DIR: Final = "/etc/octavo/api-keys"
API_KEY_FILE: Final = "keys"
TMP_DIR: Final = "/tmp"  # noqa: S108 - a path in the container, where it is a volume of its own
DOCKER_CONFIG_DIR: Final = f"{TMP_DIR}/.docker"  # in the home of the image's user
SHM_DIR: Final = "/dev/shm"  # noqa: S108 - the same
TERMINATION_LOG: Final = "/dev/termination-log"

USER_ID: Final = 65532  # the "nonroot" of distroless images; numeric, so that runAsNonRoot can be checked
PRE_STOP_SECONDS: Final = 5  # a pod that is to end serves on while the endpoints forget it
EXIT_MARGIN_SECONDS: Final = 25  # after the drain: to close the sockets and end the engine process
STARTUP_PERIOD_SECONDS: Final = 2
STARTUP_BUDGET_SECONDS: Final = 300  # until the server answers; it answers long before the model is loaded
PROGRESS_DEADLINE_SECONDS: Final = 1800  # what pulls or loads is not held to it: status.py
OLD_REPLICA_SETS: Final = 3
SHM_GIB_PER_GPU: Final = 1  # where ranks exchange through memory; a bound, so that a leak there does not eat the node


@dataclass(frozen=True, slots=True)
class _Model:
    """Where the engine finds the model, and what the pod needs for that."""

    path: str  # in the engine's container
    volume: Manifest  # mounted at MODEL_DIR
    init_containers: tuple[Manifest, ...] = ()
    more_volumes: tuple[Manifest, ...] = ()  # of the init containers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Credentials:
    """What the container that pulls gets of Secrets: the kubelet reads them, nobody else."""

    env: tuple[Manifest, ...] = ()
    volumes: tuple[Manifest, ...] = ()
    mounts: tuple[Manifest, ...] = ()


def build(
    service: InferenceService, *, engine_image: str, ends_first: bool = False, keep_count: bool = False
) -> Manifest:
    """The manifest of the Deployment.

    Args:
        service: the resource.
        engine_image: the image for services that name none.
        ends_first: whether an old pod ends before its successor starts; else the successor starts first.
        keep_count: whether the number of pods that there are stays, where the spec gives none.
    """
    spec = service.spec
    replicas: Manifest = {}
    if spec.replicas is not None:
        replicas = {"replicas": spec.replicas}
    elif spec.autoscaling is None and not keep_count:  # else it is an autoscaler's, and applying one would fight it
        replicas = {"replicas": 1}
    rolling_update = {"maxSurge": 0, "maxUnavailable": 1} if ends_first else {"maxSurge": 1, "maxUnavailable": 0}
    manifest_spec: Manifest = {
        **replicas,
        "selector": {"matchLabels": names.selector(service.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling_update},
        "progressDeadlineSeconds": PROGRESS_DEADLINE_SECONDS,
        "revisionHistoryLimit": OLD_REPLICA_SETS,
        "template": _pod_template(service, spec.engine.image or engine_image),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": object_meta(service, names.deployment(service.name)),
        "spec": manifest_spec,
    }


def _pod_template(service: InferenceService, image: str) -> Manifest:
    spec, pod = service.spec, service.spec.pod
    model = _model(service, image)
    metadata: Manifest = {"labels": {**pod.labels, **names.labels(service.name)}}
    if pod.annotations:
        metadata["annotations"] = dict(pod.annotations)
    volumes: list[Manifest] = [{"name": "model", **model.volume}, {"name": "tmp", "emptyDir": {}}, *model.more_volumes]
    if spec.endpoint.api_key_secret is not None:
        volumes.append(_key_volume(spec.endpoint.api_key_secret))
    if spec.profiles:
        volumes.append({"name": "profiles", "configMap": {"name": names.profiles(service.name)}})
    if spec.accelerator.tensor_parallel_size > 1:
        size = f"{SHM_GIB_PER_GPU * spec.accelerator.tensor_parallel_size}Gi"
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    pod_spec: Manifest = {
        "serviceAccountName": names.service_account(service.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": PRE_STOP_SECONDS + spec.rollout.drain_seconds + EXIT_MARGIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_placement(service),
        **({"initContainers": list(model.init_containers)} if model.init_containers else {}),
        "containers": [_engine_container(service, image, model.path)],
        "volumes": volumes,
    }
    return {"metadata": metadata, "spec": pod_spec}


def _placement(service: InferenceService) -> Manifest:
    """Where the pods may run, and on whose account."""
    accelerator, pod = service.spec.accelerator, service.spec.pod
    node_selector = dict(pod.node_selector)
    if accelerator.product is not None:
        node_selector[names.GPU_PRODUCT_LABEL] = accelerator.product
    tolerations = [toleration.to_dict() for toleration in pod.tolerations]
    if accelerator.type == "nvidia":
        tolerations.insert(0, {"key": names.GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    placement: Manifest = {
        "nodeSelector": node_selector,
        "affinity": pod.affinity.to_dict() if pod.affinity is not None else {},
        "tolerations": tolerations,
        "imagePullSecrets": [secret.to_dict() for secret in pod.image_pull_secrets],
        "priorityClassName": pod.priority_class_name,
        "runtimeClassName": pod.runtime_class_name,
        "topologySpreadConstraints": [
            {**each.to_dict(), "labelSelector": {"matchLabels": names.selector(service.name)}}
            for each in pod.topology_spread_constraints
        ],
    }
    return {key: value for key, value in placement.items() if value}


def _model(service: InferenceService, image: str) -> _Model:
    match source.parse(service.spec.model.source):
        case source.ClaimPath(claim, path):
            volume = {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            return _Model(f"{MODEL_DIR}/{path}".rstrip("/"), volume)
        case source.Remote(url) as remote:
            cache, credentials = service.spec.model.cache, _credentials(service.spec.model, remote)
            # Several models may come to be in one cache, one after the other or of services that share it.
            folder = MODEL_DIR if cache is None else f"{MODEL_DIR}/{hashlib.sha256(url.encode()).hexdigest()[:16]}"
            path = f"{folder}/{_pulled_name(url)}"
            # Its /ready says how far it is, on the port that the engine has after it.
            args = ["pull", url, f"--output={path}", "--host=0.0.0.0", f"--port={names.HTTP_PORT}"]
            pull = {
                **_container(names.PULL_CONTAINER, image, [*args, f"--termination-log={TERMINATION_LOG}"]),
                **_environment(service, *credentials.env),
                "resources": _resources(service, gpus=False),
                "volumeMounts": [
                    {"name": "model", "mountPath": MODEL_DIR},
                    {"name": "tmp", "mountPath": TMP_DIR},
                    *credentials.mounts,
                ],
            }
            volume = {"emptyDir": {}}
            if cache is not None:
                volume = {"persistentVolumeClaim": {"claimName": cache.claim_name or names.volume_claim(service.name)}}
            return _Model(path, volume, (pull,), credentials.volumes)


def _pulled_name(url: str) -> str:
    """What the model is called once it is pulled: a part of a split one by its own name, which tells of the others."""
    if not url.endswith(".gguf"):
        return PULLED_MODEL
    part = re.search("[^/:]+-[0-9]{5}-of-[0-9]{5}[.]gguf$", url)
    return PULLED_FILE if part is None else part[0]


def _credentials(model: ModelSpec, remote: source.Remote) -> _Credentials:
    if (token := model.token_secret) is not None:
        return _Credentials(env=(_from_secret("HF_TOKEN", token.name, token.key),))
    if (secret := model.credentials_secret) is None:
        return _Credentials()
    if remote.scheme == "s3":
        optional = {"AWS_SESSION_TOKEN"}
        return _Credentials(
            env=tuple(_from_secret(key, secret.name, key, optional=key in optional) for key in AWS_KEYS)
        )
    items = [{"key": ".dockerconfigjson", "path": "config.json"}]
    volume = {"secretName": secret.name, "defaultMode": 0o440, "items": items}
    return _Credentials(
        volumes=({"name": names.CREDENTIALS_VOLUME, "secret": volume},),
        mounts=({"name": names.CREDENTIALS_VOLUME, "mountPath": DOCKER_CONFIG_DIR, "readOnly": True},),
    )


def _key_volume(secret: KeySecret) -> Manifest:
    items = [{"key": secret.key, "path": API_KEY_FILE}]
    return {"name": "api-keys", "secret": {"secretName": secret.name, "defaultMode": 0o440, "items": items}}


def _environment(service: InferenceService, *more: Manifest) -> Manifest:
    """What the user puts into the environment of both containers; credentials are not among it."""
    env = [*(variable.to_dict() for variable in service.spec.pod.env), *more]
    return {"env": env} if env else {}


def _from_secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Manifest:
    reference: Manifest = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _engine_container(service: InferenceService, image: str, model_path: str) -> Manifest:
    mounts: list[Manifest] = [
        {"name": "model", "mountPath": MODEL_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": TMP_DIR},
    ]
    if service.spec.endpoint.api_key_secret is not None:
        mounts.append({"name": "api-keys", "mountPath": API_KEY_DIR, "readOnly": True})
    if service.spec.profiles:  # the whole folder: the kubelet never renews a file that is mounted by itself
        mounts.append({"name": "profiles", "mountPath": PROFILES_DIR, "readOnly": True})
    if service.spec.accelerator.tensor_parallel_size > 1:
        mounts.append({"name": "shm", "mountPath": SHM_DIR})
    return {
        **_container(names.ENGINE_CONTAINER, image, _serve_args(service, model_path)),
        **_environment(service),
        "ports": [{"name": names.HTTP_PORT_NAME, "containerPort": names.HTTP_PORT, "protocol": "TCP"}],
        "resources": _resources(service, gpus=True),
        # Not /ready: a load takes as long as it takes, and /health tells one that goes on from one that is stuck.
        "startupProbe": _probe(
            "/health", period=STARTUP_PERIOD_SECONDS, failures=STARTUP_BUDGET_SECONDS // STARTUP_PERIOD_SECONDS
        ),
        "readinessProbe": _probe("/ready", period=5, failures=3),
        "livenessProbe": _probe("/health", period=10, failures=6),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "volumeMounts": mounts,
    }


def _container(name: str, image: str, args: list[str]) -> Manifest:
    """What engine and pull have in common; both are the image's entry point, `octavo`."""
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _serve_args(service: InferenceService, model_path: str) -> list[str]:
    spec = service.spec
    keys = f"{API_KEY_DIR}/{API_KEY_FILE}" if spec.endpoint.api_key_secret is not None else None
    optional = {
        "--quantization": spec.engine.quantization,
        "--gpu-memory-utilization": spec.engine.gpu_memory_utilization,
        "--max-model-len": spec.engine.max_model_len,
        "--max-num-seqs": spec.engine.max_num_seqs,
        "--api-key-file": keys,
        "--profiles": f"{PROFILES_DIR}/{PROFILES_FILE}" if spec.profiles else None,
    }
    return [
        "serve",
        model_path,
        "--host=0.0.0.0",
        f"--port={names.HTTP_PORT}",
        f"--served-model-name={service.served_model_name}",
        f"--device={spec.device}",
        f"--tensor-parallel-size={spec.accelerator.tensor_parallel_size}",
        f"--dtype={spec.engine.dtype}",
        *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
        f"--shutdown-timeout={spec.rollout.drain_seconds}",
        f"--termination-log={TERMINATION_LOG}",
        *spec.engine.extra_args,
    ]


def _resources(service: InferenceService, *, gpus: bool) -> Manifest:
    accelerator, resources = service.spec.accelerator, service.spec.resources
    limits = resources.limits.to_dict()
    if gpus and accelerator.count is not None:
        limits[names.GPU_RESOURCE] = str(accelerator.count)
    parts = {"requests": resources.requests.to_dict(), "limits": limits}
    return {key: value for key, value in parts.items() if value}


def _probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": names.HTTP_PORT_NAME},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
