"""What a real API server makes of the CRD and of the children that the operator renders."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from octavo_cluster.apiserver import ApiServer
from octavo_operator import names
from octavo_operator.api.status import Condition, InferenceServiceStatus
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.cli import read
from octavo_operator.desired import children

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]
CASES: Final = sorted((ROOT / "tests/operator/golden").glob("*.children.yaml"))
NAMESPACE: Final = "crd-on-api-server"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> ApiServer:
    """The API server with the CRD, and with what the golden cases refer to."""
    kubectl = api_server.kubectl
    kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "high"}, "value": 1},
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": "gvisor"},
            "handler": "runsc",
        },
    )
    kubectl("wait", "serviceaccount/default", f"--namespace={NAMESPACE}", "--for=create", "--timeout=30s")
    return api_server


def create(server: ApiServer, name: str, **spec: Any) -> InferenceService:
    document = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"model": {"source": "pvc://models/model.gguf"}, **spec},
    }
    server.kubectl("create", "--filename=-", input=json.dumps(document))
    return InferenceService.model_validate(stored(server, name))


def stored(server: ApiServer, name: str) -> Document:
    return server.kubectl.get(names.PLURAL, name, f"--namespace={NAMESPACE}")


def dry_run(server: ApiServer, document: Document) -> str:
    answer = server.kubectl(
        "create",
        "--dry-run=server",
        "--validate=strict",
        f"--namespace={NAMESPACE}",
        "--filename=-",
        input=json.dumps(document),
        check=False,
    )
    return "" if answer.returncode == 0 else answer.stderr


def test_the_crd_is_established_and_structural(server: ApiServer) -> None:
    conditions = {
        condition["type"]: condition["status"]
        for condition in server.kubectl.get("crd", names.CRD_NAME)["status"]["conditions"]
    }
    assert conditions["Established"] == "True"
    assert "NonStructuralSchema" not in conditions


def test_the_stored_object_has_the_defaults_and_no_empty_parts(server: ApiServer) -> None:
    create(server, "defaults")
    assert stored(server, "defaults")["spec"] == {
        "model": {"source": "pvc://models/model.gguf"},
        "accelerator": {"type": "cpu"},
        "endpoint": {"port": 80},
        "engine": {"device": "auto", "dtype": "auto"},
        "rollout": {"drainSeconds": 300, "strategy": "auto"},
    }


def test_the_models_read_what_is_stored_as_they_read_what_was_written(server: ApiServer) -> None:
    written = {"autoscaling": {"maxReplicas": 3}, "resources": {"requests": {"cpu": 1}}, "pod": {"labels": {"a": "b"}}}
    service = create(server, "reads", **written)
    document = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "reads"},
        "spec": {"model": {"source": "pvc://models/model.gguf"}, **written},
    }
    assert service.spec == read(document).spec


def test_the_status_of_the_models_fits_the_schema(server: ApiServer) -> None:
    create(server, "status", replicas=3)
    status = InferenceServiceStatus(
        observed_generation=1,
        conditions=(
            Condition(
                type="Ready",
                status="True",
                reason="Serving",
                message="2 of 3 replicas serve the model.",
                observed_generation=1,
                last_transition_time="2026-01-02T03:04:05Z",
            ),
        ),
        url="http://status.crd-on-api-server.svc/v1",
        replicas=3,
        ready_replicas=2,
        selector=names.selector_text("status"),
        tensor_parallel_size=1,
        model={"architecture": "llama", "parameters": 134515008, "nested": {"deep": [1]}},
        engine_image="octavo-engine:1",
    )
    patch = json.dumps({"status": status.to_dict()})
    answer = server.kubectl(
        "patch",
        names.PLURAL,
        "status",
        f"--namespace={NAMESPACE}",
        "--subresource=status",
        "--type=merge",
        f"--patch={patch}",
    )
    assert "Warning" not in answer.stderr
    assert stored(server, "status")["status"] == status.to_dict()
    scale = json.loads(
        server.kubectl(
            "get",
            "--raw",
            f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}/status/scale",
        ).stdout
    )
    assert scale["status"] == {"replicas": 3, "selector": names.selector_text("status")}
    header, row = server.kubectl(
        "get", "ois", "status", f"--namespace={NAMESPACE}", "--output=wide"
    ).stdout.splitlines()
    assert header.split() == ["NAME", "READY", "REASON", "SERVING", "REPLICAS", "TP", "MODEL", "URL", "AGE"]
    assert row.split()[:8] == [
        "status",
        "True",
        "Serving",
        "2",
        "3",
        "1",
        "pvc://models/model.gguf",
        "http://status.crd-on-api-server.svc/v1",
    ]


def test_kubectl_scale_sets_replicas_but_not_beside_an_autoscaler(server: ApiServer) -> None:
    create(server, "scaled")
    server.kubectl("scale", "ois/scaled", f"--namespace={NAMESPACE}", "--replicas=0")
    assert stored(server, "scaled")["spec"]["replicas"] == 0
    create(server, "elastic", autoscaling={"maxReplicas": 3}, resources={"requests": {"cpu": 1}})
    refused = server.kubectl("scale", "ois/elastic", f"--namespace={NAMESPACE}", "--replicas=2", check=False)
    assert "replicas and autoscaling exclude each other" in refused.stderr


def test_kubectl_explain_tells_what_a_field_is_for(server: ApiServer) -> None:
    text = " ".join(server.kubectl("explain", "ois.spec.accelerator.count").stdout.split())
    assert "The model is split over all of them" in text


def test_the_category_lists_the_services(server: ApiServer) -> None:
    create(server, "listed")
    listed = server.kubectl("get", names.CATEGORY, f"--namespace={NAMESPACE}", "--output=name").stdout
    assert f"{names.SINGULAR}.{names.GROUP}/listed" in listed


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name.removesuffix(".children.yaml"))
def test_the_api_server_takes_the_children(server: ApiServer, path: Path) -> None:
    for child in yaml.safe_load_all(path.read_text()):
        child["metadata"]["namespace"] = NAMESPACE
        assert dry_run(server, child) == ""


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name.removesuffix(".children.yaml"))
def test_the_pods_run_where_only_restricted_pods_may(server: ApiServer, path: Path) -> None:
    documents = {child["kind"]: child for child in yaml.safe_load_all(path.read_text())}
    account, deployment = documents["ServiceAccount"], documents["Deployment"]
    account["metadata"] = {"name": account["metadata"]["name"], "namespace": NAMESPACE}
    server.kubectl.apply(account)  # admission asks for it
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "x"}}
    assert dry_run(server, pod) == ""
    del pod["spec"]["containers"][0]["securityContext"]
    assert 'violates PodSecurity "restricted' in dry_run(server, pod)


def test_a_second_apply_of_the_children_changes_nothing(server: ApiServer) -> None:
    service = create(server, "twice", accelerator={"type": "nvidia", "count": 2}, model={"source": "hf://a/b:c.gguf"})

    def apply() -> list[str]:
        versions = []
        for child in children(service, engine_image="octavo-engine:1"):
            answer = server.kubectl(
                "apply",
                "--server-side",
                f"--field-manager={names.FIELD_MANAGER}",
                "--output=jsonpath={.metadata.resourceVersion}",
                "--filename=-",
                input=json.dumps(child),
            )
            versions.append(answer.stdout)
        return versions

    assert apply() == apply()
