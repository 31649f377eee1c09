"""The chart on a real API server: what it takes, what it lets the operator do, what an uninstallation leaves.

Without nodes no pod runs here; e2e/ has the operator in one.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
import yaml

from octavo_cluster.apiserver import ApiServer

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "helm" / "octavo"
CRD: Final = "inferenceservices.serving.octavo.dev"
NAMESPACES: Final = ("octavo-system", "team-a", "team-b", "42")

Manifest: TypeAlias = dict[str, Any]
Template: TypeAlias = Callable[..., list[Manifest]]
Helm: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"

VARIANTS: Final[dict[str, Manifest]] = {
    "default": {},
    "digests": {
        "image": {"digest": "sha256:" + "a" * 64},
        "engine": {"image": {"digest": "sha256:" + "b" * 64}},
    },
    "tags": {
        "image": {"repository": "registry.example:5000/octavo/operator", "tag": "1.0", "pullPolicy": "Always"},
        "engine": {"image": {"tag": "1.0"}},
    },
    "namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "namespaced throughout": {
        "watchNamespaces": ["team-a"],
        "crds": {"enabled": False},
        "userRoles": {"create": False},
    },
    "a crd that goes": {"crds": {"keep": False}},
    "another service account": {"serviceAccount": {"create": False, "name": "ours"}},
    "no resources": {"resources": {"requests": None, "limits": None}},
    "numbers as names": {
        "watchNamespaces": ["42"],
        "serviceAccount": {"name": "7"},
        "fullnameOverride": "1e3",
        "priorityClassName": "0",
    },
    "everything": {
        "nameOverride": "serving",
        "fullnameOverride": "llm",
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccount": {"name": "operator", "annotations": {"example.com/role": "true"}},
        "log": {"level": "debug", "format": "text"},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1Gi"}},
        "podLabels": {"team": "1"},
        "podAnnotations": {"prometheus.io/scrape": "true"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "infra", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "preference": {"matchExpressions": [{"key": "infra", "operator": "Exists"}]}}
                ]
            }
        },
        "priorityClassName": "system-cluster-critical",
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """An API server of this module's own, because it installs and uninstalls the CRD."""
    with ApiServer() as server:
        for name in NAMESPACES:
            server.kubectl("create", "namespace", name)
            server.kubectl(
                *("label", "namespace", name),
                *("pod-security.kubernetes.io/enforce=restricted", "pod-security.kubernetes.io/warn=restricted"),
            )
        yield server


def as_list(objects: list[Manifest]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_api_server_takes_what_the_chart_renders(server: ApiServer, template: Template, values: Manifest) -> None:
    answer = server.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "--filename=-"), input=as_list(template(values))
    )

    # Warnings are where unknown fields, duplicates and violations of pod security in a template would show.
    assert answer.stderr == ""


def test_the_pod_of_helm_test_passes_the_restricted_pod_security_level(server: ApiServer, template: Template) -> None:
    (pod,) = [one for one in template(tests=True) if one["kind"] == "Pod"]

    assert create_pod(server, pod).stderr == ""


def operator_pod(objects: list[Manifest]) -> Manifest:
    """A pod as the Deployment's controllers would make it."""
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]
    template = deployment["spec"]["template"]
    metadata = {"name": "operator", "namespace": "octavo-system", "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def create_pod(server: ApiServer, pod: Manifest) -> subprocess.CompletedProcess[str]:
    return server.kubectl(
        *("create", "--dry-run=server", "--validate=strict", "--filename=-"), input=json.dumps(pod), check=False
    )


def test_the_operators_pod_passes_the_restricted_pod_security_level(server: ApiServer, template: Template) -> None:
    pod = operator_pod(template({"serviceAccount": {"create": False, "name": "default"}}))

    assert create_pod(server, pod).stderr == ""

    del pod["spec"]["securityContext"]["runAsNonRoot"]  # the counter-check: the level is enforced here
    assert "violates PodSecurity" in create_pod(server, pod).stderr


@pytest.fixture
def installed(server: ApiServer, helm: Helm, request: pytest.FixtureRequest) -> Iterator[str]:
    """What `helm install` prints; the values are the parameter."""
    cluster = ("--namespace", "octavo-system", "--kubeconfig", server.kubeconfig)
    values = getattr(request, "param", {})
    yield helm("install", "octavo", CHART, *cluster, values=values).stdout
    helm("upgrade", "octavo", CHART, *cluster, values=values | {"crds": {"keep": False}})
    helm("uninstall", "octavo", "--wait", *cluster)


def may(server: ApiServer, verb: str, resource: str, namespace: str) -> bool:
    user = "system:serviceaccount:octavo-system:octavo-operator"
    answer = server.kubectl(
        *("auth", "can-i", verb, resource, f"--namespace={namespace}", f"--as={user}", "--quiet"), check=False
    )
    return answer.returncode == 0


def test_the_installed_operator_may_do_its_work_and_read_no_secret(server: ApiServer, installed: str) -> None:
    for verb, resource in (
        ("watch", "inferenceservices.serving.octavo.dev"),
        ("create", "deployments.apps"),
        ("patch", "services"),
        ("delete", "horizontalpodautoscalers.autoscaling"),
        ("list", "pods"),
        ("create", "events.events.k8s.io"),
    ):
        assert may(server, verb, resource, "team-b"), f"{verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("deletecollection", "configmaps"),
        ("create", "pods"),
        ("update", "inferenceservices.serving.octavo.dev"),
        ("delete", "inferenceservices.serving.octavo.dev"),
        ("get", "nodes"),
        ("list", "namespaces"),
        ("list", "customresourcedefinitions.apiextensions.k8s.io"),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ):
        assert not may(server, verb, resource, "team-b"), f"{verb} {resource}"


@pytest.mark.parametrize("installed", [{"watchNamespaces": ["team-a"]}], indirect=True)
def test_with_namespaces_the_operator_may_work_in_these_only(server: ApiServer, installed: str) -> None:
    assert may(server, "create", "deployments.apps", "team-a")
    assert not may(server, "create", "deployments.apps", "team-b")
    assert not may(server, "get", "secrets", "team-a")


def test_who_may_edit_in_a_namespace_may_edit_its_inference_services(server: ApiServer, installed: str) -> None:
    for role, allowed in (("view", {"get": True, "create": False}), ("edit", {"get": True, "create": True})):
        server.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", "--namespace=team-a")
        for verb, expected in allowed.items():
            answer = server.kubectl(
                *("auth", "can-i", verb, CRD, "--namespace=team-a", f"--as={role}er", "--quiet"), check=False
            )
            assert (answer.returncode == 0) == expected, f"{role} {verb}"


def test_the_notes_show_a_sample_that_the_api_server_takes(server: ApiServer, installed: str) -> None:
    server.kubectl("wait", "crd", CRD, "--for=condition=Established", "--timeout=30s")
    sample = textwrap.dedent(installed.split("<<EOF\n")[1].split("  EOF\n", maxsplit=1)[0])

    answer = server.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "--namespace=team-a", "--filename=-"), input=sample
    )

    assert yaml.safe_load(sample)["metadata"]["name"] in answer.stdout
    assert "kubectl rollout status deployment/octavo-operator --namespace octavo-system" in installed


def test_inference_services_survive_an_uninstallation_and_another_installation(server: ApiServer, helm: Helm) -> None:
    cluster = ("--namespace", "octavo-system", "--kubeconfig", server.kubeconfig)
    helm("install", "octavo", CHART, *cluster)
    server.kubectl("wait", "crd", CRD, "--for=condition=Established", "--timeout=30s")
    sample = ROOT / "manifests" / "samples" / "inferenceservice.yaml"
    server.kubectl("apply", "--server-side", f"--filename={sample}", "--namespace=team-a")

    helm("uninstall", "octavo", *cluster)

    assert server.kubectl("get", "clusterrole", "octavo-operator", check=False).returncode != 0
    assert server.kubectl.get("ois", "smollm2", "--namespace=team-a")

    helm("install", "octavo", CHART, *cluster)
    assert server.kubectl.get("ois", "smollm2", "--namespace=team-a")

    helm("upgrade", "octavo", CHART, *cluster, values={"crds": {"keep": False}})
    helm("uninstall", "octavo", "--wait", *cluster)
    server.kubectl("wait", "crd", CRD, "--for=delete", "--timeout=30s")


def test_an_upgrade_and_a_rollback_change_the_operator_and_touch_no_service(server: ApiServer, helm: Helm) -> None:
    def operator_image() -> str:
        found = server.kubectl.get("deployment", "octavo-operator", "--namespace=octavo-system")
        return str(found["spec"]["template"]["spec"]["containers"][0]["image"])

    cluster = ("--namespace", "octavo-system", "--kubeconfig", server.kubeconfig)
    helm("install", "octavo", CHART, *cluster)
    server.kubectl("wait", "crd", CRD, "--for=condition=Established", "--timeout=30s")
    sample = ROOT / "manifests" / "samples" / "inferenceservice.yaml"
    server.kubectl("apply", "--server-side", f"--filename={sample}", "--namespace=team-a")
    first, service = operator_image(), server.kubectl.get("ois", "smollm2", "--namespace=team-a")

    helm("upgrade", "octavo", CHART, *cluster, values={"image": {"tag": "next"}, "log": {"level": "debug"}})
    assert operator_image() == "octavo/operator:next"
    assert server.kubectl.get("ois", "smollm2", "--namespace=team-a") == service

    helm("rollback", "octavo", "1", *cluster)
    assert operator_image() == first
    assert server.kubectl.get("ois", "smollm2", "--namespace=team-a") == service

    helm("upgrade", "octavo", CHART, *cluster, values={"crds": {"keep": False}})
    helm("uninstall", "octavo", "--wait", *cluster)
    server.kubectl("wait", "crd", CRD, "--for=delete", "--timeout=30s")
