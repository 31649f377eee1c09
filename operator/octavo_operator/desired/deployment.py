"""The Deployment that runs the engine.

Called by desired.children; pure. Here the resource becomes the engine's command line: everything that a user wrote is
passed as `--flag=value`, so that no value can be read as another flag. What it loads is settled in weights.py.
"""

from typing import Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService, KeySecret
from octavo_operator.desired import weights
from octavo_operator.desired.containers import TERMINATION_LOG, container, environment, resources
from octavo_operator.desired.metadata import Manifest, object_meta
from octavo_operator.desired.profiles import FILE_NAME as PROFILES_FILE
from octavo_operator.desired.weights import Weights

PROFILES_DIR: Final = "/etc/octavo/profiles"
API_KEY_DIR: Final = "/etc/octavo/api-keys"
API_KEY_FILE: Final = "keys"
SHM_DIR: Final = "/dev/shm"  # noqa: S108 - a path in the container, where it is a volume of its own

USER_ID: Final = 65532  # the "nonroot" of distroless images; numeric, so that runAsNonRoot can be checked
PRE_STOP_SECONDS: Final = 5  # a pod that is to end serves on while the endpoints forget it
EXIT_MARGIN_SECONDS: Final = 25  # after the drain: to close the sockets and end the engine process
STARTUP_PERIOD_SECONDS: Final = 2
STARTUP_BUDGET_SECONDS: Final = 300  # until the server answers; it answers long before the model is loaded
PROGRESS_DEADLINE_SECONDS: Final = 1800  # what pulls or loads is not held to it: status.py
OLD_REPLICA_SETS: Final = 3
SHM_GIB_PER_GPU: Final = 1  # where ranks exchange through memory; a bound, so that a leak there does not eat the node


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
    loaded = weights.build(service, image)
    metadata: Manifest = {"labels": {**pod.labels, **names.labels(service.name)}}
    if pod.annotations:
        metadata["annotations"] = dict(pod.annotations)
    volumes = list(loaded.volumes)
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
        **({"initContainers": list(loaded.init_containers)} if loaded.init_containers else {}),
        "containers": [_engine_container(service, image, loaded)],
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


def _key_volume(secret: KeySecret) -> Manifest:
    items = [{"key": secret.key, "path": API_KEY_FILE}]
    return {"name": "api-keys", "secret": {"secretName": secret.name, "defaultMode": 0o440, "items": items}}


def _engine_container(service: InferenceService, image: str, loaded: Weights) -> Manifest:
    mounts = list(loaded.mounts)
    if service.spec.endpoint.api_key_secret is not None:
        mounts.append({"name": "api-keys", "mountPath": API_KEY_DIR, "readOnly": True})
    if service.spec.profiles:  # the whole folder: the kubelet never renews a file that is mounted by itself
        mounts.append({"name": "profiles", "mountPath": PROFILES_DIR, "readOnly": True})
    if service.spec.accelerator.tensor_parallel_size > 1:
        mounts.append({"name": "shm", "mountPath": SHM_DIR})
    return {
        **container(names.ENGINE_CONTAINER, image, _serve_args(service, loaded)),
        **environment(service),
        "ports": [{"name": names.HTTP_PORT_NAME, "containerPort": names.HTTP_PORT, "protocol": "TCP"}],
        "resources": resources(service, gpus=True),
        # Not /ready: a load takes as long as it takes, and /health tells one that goes on from one that is stuck.
        "startupProbe": _probe(
            "/health", period=STARTUP_PERIOD_SECONDS, failures=STARTUP_BUDGET_SECONDS // STARTUP_PERIOD_SECONDS
        ),
        "readinessProbe": _probe("/ready", period=5, failures=3),
        "livenessProbe": _probe("/health", period=10, failures=6),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "volumeMounts": mounts,
    }


def _serve_args(service: InferenceService, loaded: Weights) -> list[str]:
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
    # One flag with several values: what is served cannot be taken for another flag, and no value is the last argument.
    adapters = [f"{name}={path}" for name, path in loaded.adapters.items()]
    return [
        "serve",
        loaded.model,
        "--host=0.0.0.0",
        f"--port={names.HTTP_PORT}",
        f"--served-model-name={service.served_model_name}",
        f"--device={spec.device}",
        f"--tensor-parallel-size={spec.accelerator.tensor_parallel_size}",
        f"--dtype={spec.engine.dtype}",
        *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
        *(("--enable-lora", "--lora-modules", *adapters) if adapters else ()),
        f"--shutdown-timeout={spec.rollout.drain_seconds}",
        f"--termination-log={TERMINATION_LOG}",
        *spec.engine.extra_args,
    ]


def _probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": names.HTTP_PORT_NAME},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
