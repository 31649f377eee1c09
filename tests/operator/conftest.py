"""Objects as controllers and the kubelet leave them, and fixtures for tests that run the operator on the API server."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.playground import USER, Playground
from octavo_operator import names, status
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.decide import Plan
from octavo_operator.desired import children
from octavo_operator.errors import ApiError
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.rollout import Frozen, Order

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 9, 9, 9, tzinfo=UTC)


def service(generation: int = 4, annotations: Json | None = None, **spec: Any) -> InferenceService:
    """An InferenceService as the API server has it."""
    metadata = {"name": "llama", "namespace": "models", "uid": "u"}
    return InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {**metadata, "generation": generation, "annotations": annotations or {}},
            "spec": {"model": {"source": "pvc://claim/model.gguf"}, **spec},
        }
    )


def deployment(
    replicas: int = 1,
    ready: int = 0,
    updated: int | None = None,
    *,
    max_surge: int = 1,
    seen: bool = True,
    **more: Any,
) -> Child:
    """The Deployment as its controller leaves it: `replicas` wanted, as many there; seen: it knows of the spec."""
    counts = {"replicas": replicas, "updatedReplicas": replicas if updated is None else updated, "readyReplicas": ready}
    body = {
        "metadata": {
            "name": "llama",
            "namespace": "models",
            "uid": "d",
            "resourceVersion": "1",
            "generation": 2,
            "labels": names.labels("llama"),
        },
        "spec": {"replicas": replicas, "strategy": {"rollingUpdate": {"maxSurge": max_surge}}},
        "status": {"observedGeneration": 2 if seen else 1, **counts, **more},
    }
    return Child.from_json("Deployment", body)


def pod(name: str = "p", *, template: str = "new", created: str = "2026-01-01T00:00:00Z", **pod_status: Any) -> Pod:
    """A pod of the engine with this status."""
    return Pod.from_json(
        {
            "metadata": {
                "name": name,
                "namespace": "models",
                "resourceVersion": "1",
                "creationTimestamp": created,
                "labels": {**names.labels("llama"), "pod-template-hash": template},
            },
            "status": {"phase": "Pending", **pod_status},
        }
    )


def unscheduled(message: str, reason: str = "Unschedulable") -> Json:
    """The status of a pod that has no node."""
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]}


def container(state: Json, name: str = "engine", *, ready: bool = False, last: Json | None = None) -> Json:
    """The status of a container."""
    return {"name": name, "image": "octavo-engine:1", "ready": ready, "state": state, "lastState": last or {}}


def engine(state: Json, *, last: Json | None = None) -> Json:
    """The status of a pod with an engine."""
    return {"phase": "Running", "containerStatuses": [container(state, last=last)]}


def terminated(message: str = "", *, code: int = 1, reason: str = "Error") -> Json:
    """The state of a container that has ended."""
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def waiting(reason: str, message: str = "") -> Json:
    """The state of a container that does not run yet."""
    return {"waiting": {"reason": reason, "message": message}}


RUNNING: Json = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
READY: Json = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
REFUSAL = json.dumps({"reason": "DeviceMissing", "message": "no CUDA device: set accelerator.type to cpu", "facts": {}})


def tell(
    *pods: Pod,
    of: InferenceService | None = None,
    there: Child | None = None,
    plan: Plan | None = None,
    failure: ApiError | None = None,
    previous: Json | None = None,
    now: datetime = NOW,
) -> Json:
    """The status for these pods of a Deployment that is not ready."""
    child = deployment(max(len(pods), 1)) if there is None else there
    return status.build(
        of or service(replicas=child.replicas),
        previous=previous or {},
        observed=Observed(children={("Deployment", "llama"): child}, pods=pods),
        plan=plan or Plan(),
        order=Order(ends_first=False, why="there is room"),
        frozen=frozen(of or service(replicas=child.replicas)),
        failure=failure,
        now=now,
    )


def frozen(of: InferenceService, *, update_available: bool = False) -> Frozen:
    """What is to be applied."""
    return Frozen(manifests=children(of, engine_image="octavo-engine:1"), update_available=update_available)


def ready(told: Json) -> tuple[str, str, str]:
    """Status, reason and message of Ready."""
    found = status.condition(told, "Ready")
    return found["status"], found["reason"], found["message"]


def statuses(told: Json) -> dict[str, str]:
    """Every condition's status, but that of UpdateAvailable."""
    return {each["type"]: each["status"] for each in told["conditions"] if each["type"] != "UpdateAvailable"}


def documents(kind: str, name: str) -> list[Json]:
    """The objects of that kind and name in the manifest of the operator's rights."""
    manifest = yaml.safe_load_all((ROOT / "manifests/install/rbac.yaml").read_text())
    return [each for each in manifest if (each["kind"], each["metadata"]["name"]) == (kind, name)]


def grant_lease(playground: Playground, lease: str, subject: Json) -> None:
    """Give the right to one Lease in the playground, as the chart gives it in the operator's own namespace."""
    (role,) = documents("Role", "octavo-operator-lease")
    role["metadata"] = {"name": lease, "namespace": playground.namespace}
    role["rules"] = json.loads(json.dumps(role["rules"]).replace("octavo-operator", lease))
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": lease}
    binding = {
        "apiVersion": role["apiVersion"],
        "kind": "RoleBinding",
        "metadata": role["metadata"],
        "roleRef": reference,
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", **subject}],
    }
    playground.server.kubectl.apply(role, binding)


@pytest.fixture(scope="session")
def octavo_server(api_server: ApiServer) -> ApiServer:
    """The API server with the CRD, and with the operator's rights given to a user of our own."""
    kubectl = api_server.kubectl
    kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
    (role,) = documents("ClusterRole", "octavo-operator")
    role["metadata"] = {"name": USER}
    kubectl.apply(
        role,
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        },
    )
    return api_server


@pytest.fixture(scope="session")
def operator_kubeconfig(octavo_server: ApiServer) -> Path:
    """The kubeconfig of the user with the operator's rights."""
    return octavo_server.kubeconfig_for(USER)


@pytest.fixture
def playground(
    octavo_server: ApiServer, operator_kubeconfig: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Playground]:
    """A namespace of the test's own."""
    test = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
    namespace = test[:63].strip("-")
    kubectl = octavo_server.kubectl
    kubectl("create", "namespace", namespace)
    kubectl("wait", "serviceaccount/default", f"--namespace={namespace}", "--for=create", "--timeout=30s")
    with Playground(octavo_server, operator_kubeconfig, namespace, tmp_path) as prepared:
        yield prepared
    kubectl("delete", "namespace", namespace, "--wait=false")
