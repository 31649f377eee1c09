"""The operator's process against a real API server: what it writes, what it leaves alone, what it heals.

Nothing makes pods here: the tests play the Deployment's controller and the kubelet.
"""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo_cluster.playground import ENGINE_IMAGE, Playground, eventually

pytestmark = pytest.mark.apiserver

CHILDREN = {  # of an elastic service called llama, by their kind's name for kubectl
    "serviceaccount": "llama-engine",
    "networkpolicy": "llama",
    "service": "llama",
    "deployment": "llama",
    "poddisruptionbudget": "llama",
    "hpa": "llama",
}
ELASTIC: dict[str, Any] = {"autoscaling": {"maxReplicas": 9}, "resources": {"requests": {"cpu": "1"}}}


def ours(child: dict[str, Any]) -> dict[str, Any]:
    """What the operator says of a child, and what it owns of it."""
    metadata = child["metadata"]
    owned = [
        entry["fieldsV1"]
        for entry in metadata.get("managedFields", ())
        if (entry["manager"], entry["operation"]) == ("octavo", "Apply")
    ]
    said = {field: metadata.get(field) for field in ("labels", "annotations", "ownerReferences")}
    stated = {field: child.get(field) for field in ("spec", "automountServiceAccountToken")}
    return {**said, **stated, "owned": owned}


def test_children_appear_by_server_side_apply_and_belong_to_the_service(playground: Playground) -> None:
    with playground.operator():
        playground.apply(**ELASTIC)
        playground.await_ready("Unknown", "Starting")
    uid = playground.there("ois")["metadata"]["uid"]
    for kind, name in CHILDREN.items():
        metadata = playground.there(kind, name)["metadata"]
        (owner,) = metadata["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("InferenceService", uid, True)
        assert [(entry["manager"], entry["operation"]) for entry in metadata["managedFields"]] == [("octavo", "Apply")]


def test_the_status_follows_the_pods_and_tells_where_the_model_is(playground: Playground) -> None:
    with playground.operator():
        playground.apply(replicas=2)
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=2, ready=1)
        playground.await_ready("Unknown", "RollingOut")
        assert playground.condition("Available")["message"] == "1 of 2 pods serve the model"
        playground.play_deployment_controller(replicas=2, ready=2)
        playground.await_ready("True", "Ready")
        status = playground.there("ois")["status"]
        conditions = {each["type"]: each for each in status.pop("conditions")}
        assert status == {
            "observedGeneration": 1,
            "url": f"http://llama.{playground.namespace}.svc/v1",
            "replicas": 2,
            "readyReplicas": 2,
            "selector": "app.kubernetes.io/component=engine,serving.octavo.dev/service=llama",
            "tensorParallelSize": 1,
            "rollout": {"strategy": "surge", "message": "there is room for one more pod, as far as is known"},
            "engineImage": ENGINE_IMAGE,
        }
        assert {type_: each["status"] for type_, each in conditions.items()} == {
            "Ready": "True",
            "Available": "True",
            "Progressing": "True",
            "UpdateAvailable": "False",
        }
        assert {each["observedGeneration"] for each in conditions.values()} == {1}
        playground.play_deployment_controller(replicas=2, ready=0)
        playground.await_ready("Unknown", "Starting")
        assert playground.condition("Available")["status"] == "False"


def test_events_tell_what_was_made_and_how_ready_changed(playground: Playground) -> None:
    with playground.operator():
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=1)
        playground.await_ready("True", "Ready")

        def told() -> list[tuple[str, str, str]]:
            events = json.loads(playground.kubectl("get", "events", "--output=json"))["items"]
            return sorted((each["type"], each["reason"], each["message"]) for each in events)

        expected = [
            (
                "Normal",
                "Created",
                (
                    "created ServiceAccount llama-engine, NetworkPolicy llama, Service llama, Deployment llama, "
                    "PodDisruptionBudget llama"
                ),
            ),
            ("Normal", "Ready", "1 of 1 pods serve the model"),
            ("Normal", "Starting", "1 of 1 pods are being started"),
        ]
        eventually(lambda: told() == expected, "the events", lambda: str(told()))


def test_a_steady_state_is_not_written_to(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(**ELASTIC)
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=1)
        playground.await_ready("True", "Ready")
        operator.rest(reconciles=3)
        written = len(playground.audit())
        resources = Counter(line["objectRef"]["resource"] for line in playground.audit())
        # The status was written at the start, when the pod was ready, and perhaps once between the two.
        assert 2 <= resources.pop("inferenceservices") <= 3
        assert resources == {
            "serviceaccounts": 1,
            "networkpolicies": 1,
            "services": 1,
            "deployments": 1,
            "controllerrevisions": 1,
            "poddisruptionbudgets": 1,
            "horizontalpodautoscalers": 1,
            "events": 3,
        }
        reconciles = operator.metric('octavo_reconciles_total{result="ok"}')
        playground.kubectl("label", "ois", "llama", "team=a")
        operator.rest(reconciles=int(reconciles) + 1)
        assert playground.audit()[written:] == []
    with playground.operator() as operator:
        operator.rest(reconciles=1)
    assert playground.audit()[written:] == []


def test_a_deleted_child_is_back_within_two_seconds(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(**ELASTIC)
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
        for kind, name in CHILDREN.items():
            lost = playground.there(kind, name)["metadata"]["uid"]
            started = time.monotonic()
            playground.kubectl("delete", kind, name, "--wait=false")
            eventually(lambda: playground.uid(kind, name) not in {lost, None}, f"a new {kind}")  # noqa: B023 - called at once
            assert time.monotonic() - started < 2.0


CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("serviceaccount", {"automountServiceAccountToken": True}),
    ("networkpolicy", {"spec": {"ingress": [{}]}}),
    ("networkpolicy", {"spec": {"policyTypes": ["Ingress", "Egress"]}}),
    ("poddisruptionbudget", {"spec": {"maxUnavailable": 0}}),
    ("poddisruptionbudget", {"spec": {"unhealthyPodEvictionPolicy": "IfHealthyBudget"}}),
    ("deployment", {"spec": {"replicas": 7}}),
    ("deployment", {"spec": {"template": {"metadata": {"labels": {"app.kubernetes.io/name": "other"}}}}}),
    ("deployment", {"spec": {"template": {"spec": {"automountServiceAccountToken": True}}}}),
    ("deployment", {"metadata": {"annotations": {"serving.octavo.dev/manifest-hash": None}}}),
    ("service", {"spec": {"ports": [{"name": "http", "port": 81, "targetPort": "http"}]}}),
    ("service", {"spec": {"selector": {"app.kubernetes.io/component": "nothing"}}}),
    ("service", {"metadata": {"labels": {"serving.octavo.dev/service": None}}}),
    ("service", {"metadata": {"managedFields": [{}]}}),
)


def test_a_change_to_our_fields_is_healed(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(replicas=2)
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
        for kind, change in CHANGES:
            name = CHILDREN[kind]
            right = ours(playground.there(kind, name))
            playground.patch(kind, change, name)
            eventually(lambda: ours(playground.there(kind, name)) == right, f"healing of {change}")  # noqa: B023 - called at once


def test_a_child_without_its_owner_reference_could_be_anybodys_and_is_left_alone(playground: Playground) -> None:
    with playground.operator():
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        playground.patch("deployment", {"metadata": {"ownerReferences": None}})
        playground.await_ready("False", "ChildConflict")
        assert "ownerReferences" not in playground.there("deployment")["metadata"]


def test_what_others_add_is_left_alone(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
        written = len(playground.audit())
        sidecar = [{"op": "add", "path": "/spec/template/spec/containers/-", "value": {"name": "mesh", "image": "m:1"}}]
        playground.kubectl("patch", "deployment", "llama", "--type=json", f"--patch={json.dumps(sidecar)}")
        playground.kubectl("rollout", "restart", "deployment/llama")
        playground.patch("service", {"metadata": {"annotations": {"mesh.example/on": "yes"}}})
        playground.patch("service", {"spec": {"sessionAffinity": "ClientIP"}})
        reconciles = operator.metric('octavo_reconciles_total{result="ok"}')
        playground.kubectl("label", "ois", "llama", "touched=yes")
        operator.rest(reconciles=int(reconciles) + 1)
        assert [line for line in playground.audit()[written:] if line["objectRef"].get("subresource") != "status"] == []
        template = playground.there("deployment")["spec"]["template"]
        assert [container["name"] for container in template["spec"]["containers"]] == ["engine", "mesh"]
        # A change of the spec is applied around what others added.
        playground.apply(engine={"maxModelLen": 64})
        eventually(lambda: "--max-model-len=64" in json.dumps(playground.there("deployment")), "the new argument")
        template = playground.there("deployment")["spec"]["template"]
        assert [container["name"] for container in template["spec"]["containers"]] == ["engine", "mesh"]
        assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
        assert playground.there("service")["metadata"]["annotations"]["mesh.example/on"] == "yes"


def test_a_field_that_leaves_the_spec_leaves_the_child(playground: Playground) -> None:
    with playground.operator():
        playground.apply(engine={"maxModelLen": 64}, pod={"priorityClassName": "system-node-critical"})
        eventually(lambda: playground.get("deployment") is not None, "a Deployment")
        assert playground.there("deployment")["spec"]["template"]["spec"]["priorityClassName"] == "system-node-critical"
        playground.apply()
        eventually(
            lambda: "priorityClassName" not in playground.there("deployment")["spec"]["template"]["spec"],
            "the priority class gone",
        )
        assert "--max-model-len" not in json.dumps(playground.there("deployment")["spec"])


def test_a_deleted_service_takes_its_children_along_also_without_an_operator(playground: Playground) -> None:
    with playground.operator():
        playground.apply(**ELASTIC)
        playground.await_ready("Unknown", "Starting")
    metadata = playground.there("ois")["metadata"]
    assert "finalizers" not in metadata
    assert list(metadata["annotations"]) == ["kubectl.kubernetes.io/last-applied-configuration"]
    playground.kubectl("delete", "ois", "llama", "--timeout=10s")
    for kind, name in CHILDREN.items():
        eventually(lambda: playground.get(kind, name) is None, f"no {kind} left")  # noqa: B023 - called at once


def test_a_deleted_service_is_not_brought_back_by_a_running_operator(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(**ELASTIC)
        playground.await_ready("Unknown", "Starting")
        playground.kubectl("delete", "ois", "llama", "--cascade=foreground", "--timeout=20s")
        operator.rest(reconciles=2)
        assert [kind for kind, name in CHILDREN.items() if playground.get(kind, name) is not None] == []
        # A new one of the same name gets children of its own.
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        uid = playground.there("ois")["metadata"]["uid"]
        for kind in ("deployment", "service"):
            assert playground.there(kind)["metadata"]["ownerReferences"][0]["uid"] == uid


@contextmanager
def watched_replicas(playground: Playground) -> Iterator[list[str]]:
    """Collect every number of replicas that the Deployment ever has."""
    numbers: list[str] = []
    command = playground.server.kubectl.command(
        f"--namespace={playground.namespace}",
        *("get", "deployment", "llama", "--watch", "--output=jsonpath={.spec.replicas}{'\\n'}"),
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield numbers
    finally:
        process.terminate()
        numbers.extend(process.communicate(timeout=10)[0].split())


def test_autoscaling_takes_the_number_of_replicas_over_and_gives_it_back(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(replicas=5)
        playground.await_ready("Unknown", "Starting")
        with watched_replicas(playground) as numbers:
            playground.apply(**ELASTIC)
            eventually(lambda: playground.get("hpa") is not None, "an autoscaler")
            operator.rest(reconciles=2)
            playground.kubectl("scale", "deployment/llama", "--replicas=3")  # as the autoscaler does
            reconciles = operator.metric('octavo_reconciles_total{result="ok"}')
            playground.kubectl("label", "ois", "llama", "touched=yes")
            operator.rest(reconciles=int(reconciles) + 1)
            assert playground.there("deployment")["spec"]["replicas"] == 3
        assert list(dict.fromkeys(numbers)) == ["5", "3"]
        playground.apply()
        eventually(lambda: playground.get("hpa") is None, "no autoscaler")
        operator.rest(reconciles=3)
        assert playground.there("deployment")["spec"]["replicas"] == 3
        playground.apply(replicas=4)
        eventually(lambda: playground.there("deployment")["spec"]["replicas"] == 4, "4 replicas")


def test_somebody_elses_object_is_not_touched_and_the_service_recovers_when_it_is_gone(playground: Playground) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "llama"},
        "spec": {"ports": [{"port": 1234}]},
    }
    playground.kubectl("create", "--filename=-", document=foreign)
    before = playground.there("service")
    with playground.operator():
        playground.apply()
        told = playground.await_ready("False", "ChildConflict")
        assert told["message"] == (
            'Service "llama" exists already and does not belong to this InferenceService: '
            "delete it, or give the InferenceService another name"
        )
        assert playground.there("service") == before
        playground.kubectl("delete", "service", "llama")
        playground.await_ready("Unknown", "Starting")
        assert playground.there("service")["metadata"]["ownerReferences"]


def test_what_ails_a_pod_is_told_and_forgotten_when_it_is_over(playground: Playground) -> None:
    with playground.operator():
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=0)
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        message = '0/1 nodes are available: persistentvolumeclaim "models" not found.'
        playground.play_pod("llama-1-a", {"phase": "Pending", "conditions": [{**scheduled, "message": message}]})
        told = playground.await_ready("False", "ModelSourceNotFound")
        assert told["message"] == (
            f'1 of 1 pods cannot start: PersistentVolumeClaim "models" does not exist in namespace '
            f"{playground.namespace}: create it, or correct spec.model.source"
        )
        refusal = {"reason": "ModelNotFound", "message": "/models/model.gguf: no such file", "facts": {"a": 1}}
        ended = {"exitCode": 2, "reason": "Error", "message": json.dumps(refusal)}
        waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting"}}
        engine = {"name": "engine", "image": ENGINE_IMAGE, "imageID": "", "ready": False, "restartCount": 1}
        conditions = [{"type": "PodScheduled", "status": "True"}]
        crashed = {**engine, "state": waiting, "lastState": {"terminated": ended}}
        playground.play_pod("llama-1-a", {"phase": "Running", "conditions": conditions, "containerStatuses": [crashed]})
        told = playground.await_ready("False", "ModelNotFound")
        assert told["message"] == "/models/model.gguf: no such file"
        assert playground.there("ois")["status"]["model"] == {"a": 1}
        playground.play_deployment_controller(replicas=1, ready=1)
        playground.await_ready("True", "Ready")


def test_a_stored_service_that_became_invalid_says_so_and_keeps_its_children(playground: Playground) -> None:
    kubectl = playground.server.kubectl
    crd = kubectl.get("crd", "inferenceservices.serving.octavo.dev")
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    rules = spec["model"]["properties"]["source"].pop("x-kubernetes-validations")
    definition = {"apiVersion": crd["apiVersion"], "kind": crd["kind"], "metadata": {"name": crd["metadata"]["name"]}}
    with playground.operator():
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        kubectl("replace", "--filename=-", input=json.dumps({**crd, "metadata": definition["metadata"]}))
        try:
            change = '--patch={"spec": {"model": {"source": "ftp://host/model.gguf"}}}'
            eventually(
                lambda: (
                    kubectl(
                        *("patch", "ois", "llama", f"--namespace={playground.namespace}", "--type=merge", change),
                        check=False,
                    ).returncode
                    == 0
                ),
                "the laxer CRD",
            )
        finally:
            spec["model"]["properties"]["source"]["x-kubernetes-validations"] = rules
            kubectl("replace", "--filename=-", input=json.dumps({**crd, "metadata": definition["metadata"]}))
        told = playground.await_ready("False", "InvalidSpec")
        assert told["message"].startswith("spec.model.source: must start with pvc://, hf://, https://")
        assert told["observedGeneration"] == 2
        assert "pvc://" not in playground.there("ois")["spec"]["model"]["source"]
        assert playground.get("deployment") is not None
        playground.apply()
        playground.await_ready("Unknown", "Starting")


def test_an_operator_for_all_namespaces_finds_services_and_children_everywhere(playground: Playground) -> None:
    playground.apply(replicas=1)
    with playground.operator("--log-format=json") as operator:
        playground.await_ready("Unknown", "Starting")
        playground.kubectl("delete", "service", "llama")
        eventually(lambda: playground.get("service") is not None, "a new Service")
        assert operator.process.poll() is None
    lines = [line for line in operator.log.read_text().splitlines() if "created Service llama" in line]
    assert json.loads(lines[0])["severity"] == "info"
