"""What is told, from plain objects as the API server gives them; covers observe.py, diagnosis.py and status.py."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from octavo_operator import diagnosis, names, status
from octavo_operator.api.status import InferenceServiceStatus
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.decide import Plan
from octavo_operator.desired import children
from octavo_operator.errors import ApiError, Forbidden, Refused
from octavo_operator.events import Event, of_plan, of_transition
from octavo_operator.observe import Child, Observed, Owner, Pod
from octavo_operator.resources import Key
from octavo_operator.rollout import Frozen, Order

Json = dict[str, Any]

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 9, 9, 9, tzinfo=UTC)


def service(**spec: Any) -> InferenceService:
    return InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "llama", "namespace": "models", "uid": "u", "generation": 4},
            "spec": {"model": {"source": "pvc://claim/model.gguf"}, **spec},
        }
    )


def deployment(replicas: int = 1, ready: int = 0, updated: int | None = None, **more: Any) -> Child:
    """The Deployment as its controller leaves it: `replicas` wanted, as many there."""
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
        "spec": {"replicas": replicas},
        "status": {"observedGeneration": 2, **counts, **more},
    }
    return Child.from_json("Deployment", body)


def pod(name: str = "p", *, template: str = "new", created: str = "2026-01-01T00:00:00Z", **pod_status: Any) -> Pod:
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
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]}


def container(state: Json, name: str = "engine", *, ready: bool = False, last: Json | None = None) -> Json:
    return {"name": name, "image": "octavo-engine:1", "ready": ready, "state": state, "lastState": last or {}}


def engine(state: Json, *, last: Json | None = None) -> Json:
    return {"phase": "Running", "containerStatuses": [container(state, last=last)]}


def terminated(message: str = "", *, code: int = 1, reason: str = "Error") -> Json:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def waiting(reason: str, message: str = "") -> Json:
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
    return Frozen(manifests=children(of, engine_image="octavo-engine:1"), update_available=update_available)


def ready(told: Json) -> tuple[str, str, str]:
    found = status.condition(told, "Ready")
    return found["status"], found["reason"], found["message"]


def statuses(told: Json) -> dict[str, str]:
    return {each["type"]: each["status"] for each in told["conditions"] if each["type"] != "UpdateAvailable"}


GPU_MESSAGE = (
    "0/3 nodes are available: 1 node(s) had untolerated taint {a: b}, 2 Insufficient nvidia.com/gpu. "
    "no new claims to deallocate, preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
)

AILMENTS: tuple[tuple[str, Json, tuple[str, str, str]], ...] = (
    (
        "no GPU free",
        unscheduled(GPU_MESSAGE),
        (
            "False",
            "Unschedulable",
            (
                "1 of 1 pods wait for nvidia.com/gpu: 0/3 nodes are available: 1 node(s) had untolerated taint {a: b}, "
                "2 Insufficient nvidia.com/gpu. Free GPUs or add nodes with them, or lower spec.accelerator.count"
            ),
        ),
    ),
    (
        "no memory free",
        unscheduled("0/1 nodes are available: 1 Insufficient memory. preemption: 0/1 nodes are available: x."),
        (
            "False",
            "Unschedulable",
            (
                "1 of 1 pods wait for memory: 0/1 nodes are available: 1 Insufficient memory. Add nodes, or lower "
                "spec.resources.requests"
            ),
        ),
    ),
    (
        "no such claim",
        unscheduled('0/1 nodes are available: persistentvolumeclaim "claim" not found. preemption: 0/1 nodes ...'),
        (
            "False",
            "ModelSourceNotFound",
            (
                '1 of 1 pods cannot start: PersistentVolumeClaim "claim" does not exist in namespace models: '
                "create it, or correct spec.model.source"
            ),
        ),
    ),
    (
        "gated",
        unscheduled("Scheduling is blocked due to non-empty scheduling gates", reason="SchedulingGated"),
        ("Unknown", "SchedulingGated", "1 of 1 pods wait for their scheduling gates to be lifted"),
    ),
    (
        "image pull fails",
        engine(waiting("ErrImagePull", "rpc error 7f3a")),
        (
            "False",
            "ImagePullFailed",
            (
                '1 of 1 pods cannot pull the image "octavo-engine:1": check that it exists, and '
                "spec.pod.imagePullSecrets if its registry wants a login"
            ),
        ),
    ),
    (
        "a secret is missing",
        engine(waiting("CreateContainerConfigError", 'secret "token" not found')),
        (
            "False",
            "SecretNotFound",
            '1 of 1 pods cannot start: Secret "token" does not exist: create it, or correct spec.pod.env',
        ),
    ),
    (
        "no entry point",
        engine(
            waiting("CrashLoopBackOff"),
            last=terminated('exec: "octavo": not found in $PATH', code=128, reason="StartError"),
        ),
        (
            "False",
            "ContainerStartFailed",
            '1 of 1 pods cannot start the container "engine": exec: "octavo": not found in $PATH',
        ),
    ),
    (
        "refused just now",
        engine(terminated(REFUSAL)),
        ("False", "DeviceMissing", "no CUDA device: set accelerator.type to cpu"),
    ),
    (
        "refused, backing off",
        engine(waiting("CrashLoopBackOff", "back-off 5m0s"), last=terminated(REFUSAL)),
        ("False", "DeviceMissing", "no CUDA device: set accelerator.type to cpu"),
    ),
    (
        "refused, starting anew",
        engine(RUNNING, last=terminated(REFUSAL)),
        ("False", "DeviceMissing", "no CUDA device: set accelerator.type to cpu"),
    ),
    (
        "pull refused",
        {
            "initContainerStatuses": [container(terminated(REFUSAL.replace("DeviceMissing", "StorageFull")), "pull")],
            "containerStatuses": [container(waiting("PodInitializing"))],
        },
        ("False", "StorageFull", "no CUDA device: set accelerator.type to cpu"),
    ),
    (
        "killed for its memory",
        engine(waiting("CrashLoopBackOff"), last=terminated(code=137, reason="OOMKilled")),
        (
            "False",
            "OutOfMemory",
            (
                '1 of 1 pods ran out of memory in the container "engine": raise spec.resources.limits.memory, '
                "or lower spec.engine.maxModelLen or maxNumSeqs"
            ),
        ),
    ),
    (
        "crashed with a log",
        engine(
            terminated(
                "Traceback (most recent call last):\n  ...\n2026-01-01T10:11:12.5Z ValueError: at 0x7f12ab34cd\n\n"
            )
        ),
        ("False", "ContainerCrashed", 'the container "engine" of 1 of 1 pods ended with exit code 1: ValueError: at'),
    ),
    (
        "crashed in silence",
        engine(terminated(code=139)),
        (
            "False",
            "ContainerCrashed",
            'the container "engine" of 1 of 1 pods ended with exit code 139: it left no message; its log may say more',
        ),
    ),
    (
        "JSON that is not ours",
        engine(terminated('{"reason": "no reason of ours", "message": 3}')),
        (
            "False",
            "ContainerCrashed",
            (
                'the container "engine" of 1 of 1 pods ended with exit code 1: '
                '{"reason": "no reason of ours", "message": 3}'
            ),
        ),
    ),
    (
        "keeps ending with 0",
        engine(waiting("CrashLoopBackOff"), last=terminated(code=0, reason="Completed")),
        (
            "False",
            "ContainerCrashed",
            'the container "engine" of 1 of 1 pods ended with exit code 0: it left no message; its log may say more',
        ),
    ),
    (
        "evicted",
        {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory. "},
        ("False", "PodFailed", "1 of 1 pods failed: Evicted: The node was low on resource: memory."),
    ),
    ("loads", engine(RUNNING), ("Unknown", "Loading", "1 of 1 pods load the model")),
    (
        "loads again after a restart without a fault",
        engine(RUNNING, last=terminated(code=0, reason="Completed")),
        ("Unknown", "Loading", "1 of 1 pods load the model"),
    ),
    (
        "pulls",
        {
            "initContainerStatuses": [container(RUNNING, "pull")],
            "containerStatuses": [container(waiting("PodInitializing"))],
        },
        ("Unknown", "Pulling", "1 of 1 pods pull the model from pvc://claim/model.gguf"),
    ),
    (
        "has pulled",
        {
            "initContainerStatuses": [container(terminated(code=0, reason="Completed"), "pull", ready=True)],
            "containerStatuses": [container(waiting("PodInitializing"))],
        },
        ("Unknown", "Loading", "1 of 1 pods load the model"),
    ),
    ("is made", {}, ("Unknown", "Starting", "1 of 1 pods are being started")),
    (
        "creates its container",
        engine(waiting("ContainerCreating")),
        ("Unknown", "Starting", "1 of 1 pods are being started"),
    ),
)


@pytest.mark.parametrize(
    ("pod_status", "expected"), [case[1:] for case in AILMENTS], ids=[case[0] for case in AILMENTS]
)
def test_every_ailment_of_a_pod_has_its_reason_and_sentence(pod_status: Json, expected: tuple[str, str, str]) -> None:
    told = tell(pod(**pod_status))
    assert ready(told) == expected
    stuck = expected[0] == "False"
    assert statuses(told) == {"Ready": expected[0], "Available": "False", "Progressing": "False" if stuck else "True"}
    assert {each["reason"] for each in told["conditions"]} == {expected[1], "UpToDate"}
    InferenceServiceStatus.model_validate(told)


@pytest.mark.parametrize("pod_status", [case[1] for case in AILMENTS], ids=[case[0] for case in AILMENTS])
def test_a_pod_that_is_ready_again_leaves_no_trace_of_what_ailed_it(pod_status: Json) -> None:
    before = tell(pod(**pod_status))
    after = tell(pod(**{**pod_status, **READY}), there=deployment(1, ready=1), previous=before, now=LATER)
    assert ready(after) == ("True", "Ready", "1 of 1 pods serve the model")
    assert statuses(after) == {"Ready": "True", "Available": "True", "Progressing": "True"}


@pytest.mark.parametrize("pod_status", [case[1] for case in AILMENTS], ids=[case[0] for case in AILMENTS])
def test_the_same_state_at_another_time_is_told_in_the_same_words(pod_status: Json) -> None:
    before = tell(pod(**pod_status))
    assert tell(pod("q", created="2026-05-05T00:00:00Z", **pod_status), previous=before, now=LATER) == before


def test_no_generated_name_gets_into_a_message() -> None:
    failure = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreate",
        "message": 'pods "llama-6d4cf56db6-x7k2p" is forbidden: exceeded quota: gpus, requested: 2, limited: 1',
    }
    told = tell(there=deployment(1, updated=0, conditions=[failure]))
    assert ready(told) == (
        "False",
        "QuotaExceeded",
        (
            "pods cannot be created: exceeded quota: gpus, requested: 2, limited: 1: raise the ResourceQuota of "
            "namespace models, or lower spec.replicas, spec.resources or spec.accelerator.count"
        ),
    )


def test_the_gravest_finding_is_told_with_the_number_of_pods_it_concerns() -> None:
    told = tell(
        pod("a", **engine(RUNNING)),
        pod("b", **unscheduled("0/1 nodes are available: 1 Insufficient cpu.")),
        pod("c", **unscheduled("0/1 nodes are available: 1 Insufficient cpu.")),
        pod("d", **READY),
        there=deployment(4, ready=1),
    )
    assert ready(told)[2].startswith("2 of 4 pods wait for cpu")
    assert status.condition(told, "Available")["message"] == "1 of 4 pods serve the model"
    assert statuses(told) == {"Ready": "False", "Available": "True", "Progressing": "False"}


def test_the_order_of_the_pods_does_not_matter() -> None:
    pods = [
        pod("a", **unscheduled("0/2 nodes are available: x.")),
        pod("b", **unscheduled("0/1 nodes are available: y.")),
    ]
    assert tell(*pods) == tell(*reversed(pods))


def test_what_ails_pods_of_an_older_template_is_history() -> None:
    old = pod("old", template="old", created="2026-01-01T00:00:00Z", **engine(terminated(REFUSAL)))
    new = pod("new", template="new", created="2026-01-02T00:00:00Z", **engine(RUNNING))
    assert ready(tell(old, new, of=service(), there=deployment(1)))[1] == "Loading"


def test_before_the_new_template_has_a_pod_the_old_ones_are_not_blamed() -> None:
    old = pod(**engine(terminated(REFUSAL)))
    unseen = replace(deployment(1), generation=3)
    assert ready(tell(old, there=unseen))[:2] == ("Unknown", "Starting")
    assert ready(tell(old, there=deployment(1, updated=0)))[:2] == ("Unknown", "Starting")


def test_on_its_way_to_ready_a_service_only_advances() -> None:
    pulled: Json = {"initContainerStatuses": [container(terminated(code=0, reason="Completed"), "pull", ready=True)]}
    way = [
        ({"initContainerStatuses": [container(waiting("PodInitializing"), "pull")]}, deployment(1)),
        ({"initContainerStatuses": [container(RUNNING, "pull")]}, deployment(1)),
        (pulled | {"containerStatuses": [container(waiting("PodInitializing"))]}, deployment(1)),
        (pulled | engine(RUNNING), deployment(1)),
        (pulled | READY, deployment(1)),  # the pod is ready, and the Deployment does not know it yet
        (pulled | READY, deployment(1, ready=1)),
    ]
    reasons = [ready(tell(pod(**pod_status), there=there))[1] for pod_status, there in way]
    assert reasons == ["Starting", "Pulling", "Loading", "Loading", "RollingOut", "Ready"]


def test_of_pods_on_their_way_the_one_that_is_least_far_is_told() -> None:
    pulling: Json = {"initContainerStatuses": [container(RUNNING, "pull")]}
    there = deployment(3, ready=1)
    assert ready(tell(pod("a", **READY), pod("b", **engine(RUNNING)), pod("c", **pulling), there=there))[1] == "Pulling"
    assert ready(tell(pod("a", **READY), pod("b", **READY), pod("c", **pulling), there=there))[1] == "Pulling"
    assert ready(tell(pod("a", **READY), pod("b", **READY), pod("c"), there=there))[1] == "Starting"


def test_a_pod_that_is_going_is_not_counted() -> None:
    going = replace(pod("going", **engine(terminated(REFUSAL))), deleting=True)
    assert ready(tell(going, pod("b", **engine(RUNNING)), there=deployment(1)))[1] == "Loading"


def test_a_rollout_is_told_until_nothing_of_the_old_version_is_left() -> None:
    new = pod("new", **READY)
    told = tell(new, of=service(replicas=1), there=replace(deployment(2, ready=2, updated=1), replicas=1))
    assert ready(told) == (
        "Unknown",
        "RollingOut",
        "2 of 2 pods serve the model; 1 of 1 are of the latest version",
    )
    assert statuses(told)["Available"] == "True"


def test_a_rollout_that_is_too_late_says_so() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    told = tell(pod(**engine(RUNNING)), there=deployment(1, conditions=[late]))
    assert ready(told) == (
        "False",
        "ProgressDeadlineExceeded",
        "no pod has become ready for too long: timed out",
    )


def test_before_there_is_a_deployment_the_pods_are_being_started() -> None:
    told = status.build(
        service(replicas=3),
        previous={},
        observed=Observed(children={}),
        plan=Plan(),
        order=Order(ends_first=False, why=""),
        frozen=frozen(service()),
        failure=None,
        now=NOW,
    )
    assert ready(told) == ("Unknown", "Starting", "3 of 3 pods are being started")
    assert (told["replicas"], told["readyReplicas"]) == (0, 0)


def test_a_suspended_service_is_neither_ready_nor_stuck() -> None:
    told = tell(of=service(replicas=0), there=deployment(0))
    assert ready(told) == (
        "False",
        "Suspended",
        "spec.replicas is 0: set it to 1 or more to serve the model",
    )
    assert statuses(told) == {"Ready": "False", "Available": "False", "Progressing": "True"}


def test_an_autoscaled_service_is_ready_with_the_number_that_the_autoscaler_wants() -> None:
    elastic = service(autoscaling={"minReplicas": 2, "maxReplicas": 9}, resources={"requests": {"cpu": "1"}})
    assert ready(tell(of=elastic, there=deployment(5, ready=5)))[2] == "5 of 5 pods serve the model"
    assert ready(tell(of=elastic, there=replace(deployment(2, ready=2), replicas=5)))[:2] == ("Unknown", "RollingOut")
    assert ready(tell(of=elastic, there=replace(deployment(0), replicas=None)))[2] == "2 of 2 pods are being started"


def test_a_conflict_is_graver_than_anything_in_the_pods() -> None:
    foreign = Child(service=Key("models", ""), kind="Service", name="llama", uid="x", version=1)
    told = tell(there=deployment(1, ready=1), plan=Plan(conflicts=(foreign,)))
    assert ready(told) == (
        "False",
        "ChildConflict",
        (
            'Service "llama" exists already and does not belong to this InferenceService: '
            "delete it, or give the InferenceService another name"
        ),
    )


def test_a_child_on_its_way_out_is_told() -> None:
    leaving = replace(deployment(1), deleting=True)
    assert ready(tell(plan=Plan(leaving=(leaving,)))) == (
        "Unknown",
        "ReplacingChild",
        'Deployment "llama" is being deleted and will be made anew',
    )


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Forbidden('services is forbidden: User "x" cannot patch', status=403), "Forbidden"),
        (Refused("bad"), "ChildRefused"),
    ],
)
def test_a_refusal_of_the_api_server_is_told_in_its_words(failure: ApiError, reason: str) -> None:
    told = ready(tell(failure=failure))
    assert told[:2] == ("False", reason)
    assert told[2].endswith(str(failure))


def test_a_transition_time_changes_only_when_the_status_flips() -> None:
    first = tell(pod(**engine(RUNNING)))
    second = tell(pod(**engine(waiting("ContainerCreating"))), previous=first, now=LATER)
    assert {each["lastTransitionTime"] for each in second["conditions"]} == {"2026-01-02T03:04:05Z"}
    third = tell(pod(**engine(terminated(REFUSAL))), previous=second, now=LATER)
    assert {each["type"]: each["lastTransitionTime"] for each in third["conditions"]} == {
        "Ready": "2026-01-02T09:09:09Z",
        "Available": "2026-01-02T03:04:05Z",
        "Progressing": "2026-01-02T09:09:09Z",
        "UpdateAvailable": "2026-01-02T03:04:05Z",
    }


def test_every_condition_speaks_of_the_generation_that_was_acted_on() -> None:
    told = tell()
    assert {told["observedGeneration"], *(each["observedGeneration"] for each in told["conditions"])} == {4}


def test_the_status_says_what_clients_and_autoscalers_need() -> None:
    told = tell(
        of=service(accelerator={"type": "nvidia", "count": 2}, endpoint={"port": 8080}, engine={"image": "mine"})
    )
    del told["conditions"]
    assert told == {
        "observedGeneration": 4,
        "url": "http://llama.models.svc:8080/v1",
        "replicas": 1,
        "readyReplicas": 0,
        "selector": names.selector_text("llama"),
        "tensorParallelSize": 2,
        "rollout": {"strategy": "surge", "message": "there is room"},
        "engineImage": "mine",
    }


def test_an_operator_that_would_make_other_pods_says_so_and_how_they_are_replaced() -> None:
    told = status.build(
        service(),
        previous={},
        observed=Observed(children={("Deployment", "llama"): deployment(1, ready=1)}),
        plan=Plan(),
        order=Order(ends_first=True, why="no GPUs are free"),
        frozen=frozen(service(), update_available=True),
        failure=None,
        now=NOW,
    )
    found = status.condition(told, "UpdateAvailable")
    assert (found["status"], found["reason"]) == ("True", "OperatorChanged")
    assert "kubectl annotate --overwrite ois/llama serving.octavo.dev/update=" in found["message"]
    assert told["rollout"] == {"strategy": "replace", "message": "no GPUs are free"}
    assert ready(told)[0] == "True"
    InferenceServiceStatus.model_validate(told)


def test_the_facts_of_the_model_come_from_the_newest_pod_that_knows_them() -> None:
    def pulled(facts: Json) -> Json:
        message = json.dumps({"facts": facts})
        return {"initContainerStatuses": [container(terminated(message, code=0), "pull", ready=True)]}

    told = tell(
        pod("a", created="2026-01-01T00:00:00Z", **pulled({"layers": 1})),
        pod("b", created="2026-01-02T00:00:00Z", **pulled({"layers": 2})),
        pod("c", created="2026-01-03T00:00:00Z"),
    )
    assert told["model"] == {"layers": 2}
    assert "model" not in tell(pod(**pulled({})))


def test_an_invalid_spec_keeps_what_was_told_and_counts_what_still_serves() -> None:
    before = tell(there=deployment(2, ready=2), of=service(replicas=2))
    told = status.build_invalid(
        "llama",
        5,
        "spec.model.source: must start with pvc://",
        previous=before,
        observed=Observed(children={("Deployment", "llama"): deployment(2, ready=1)}),
        now=LATER,
    )
    assert ready(told) == ("False", "InvalidSpec", "spec.model.source: must start with pvc://")
    assert statuses(told) == {"Ready": "False", "Available": "True", "Progressing": "False"}
    assert (told["url"], told["readyReplicas"], told["observedGeneration"]) == (before["url"], 1, 5)
    InferenceServiceStatus.model_validate(told)


def test_conditions_of_others_are_not_ours_to_compare() -> None:
    told = tell()
    stored = {**told, "conditions": [*told["conditions"], {"type": "Audited", "status": "True"}]}
    assert status.ours(stored) == told


def test_the_table_of_causes_is_sound() -> None:
    for cause in diagnosis.Cause:
        row = cause.value
        assert row.ready in {"True", "False", "Unknown"}
        assert re.fullmatch("[A-Z][A-Za-z]+|{reason}", row.reason), row
        assert (row.ready == "True") == (cause is diagnosis.Cause.READY)


def test_a_user_cannot_smuggle_a_template_into_a_message() -> None:
    refusal = json.dumps({"reason": "ModelNotFound", "message": "{pods} {0} {self}"})
    assert ready(tell(pod(**engine(terminated(refusal)))))[2] == "{pods} {0} {self}"


def test_ready_is_told_as_an_event_when_its_status_or_reason_changes() -> None:
    loading = tell(pod(**engine(RUNNING)))
    broken = tell(pod(**engine(terminated(REFUSAL))), previous=loading)
    assert of_transition({}, loading) == [Event("Normal", "Loading", "Reconcile", "1 of 1 pods load the model")]
    assert of_transition(loading, loading) == []
    assert of_transition(loading, broken) == [
        Event("Warning", "DeviceMissing", "Reconcile", "no CUDA device: set accelerator.type to cpu")
    ]
    suspended = tell(of=service(replicas=0), there=deployment(0))
    assert [event.type for event in of_transition(broken, suspended)] == ["Normal"]


def test_children_that_come_and_go_are_told_as_events() -> None:
    gone = replace(deployment(), kind="HorizontalPodAutoscaler", owner=Owner(kind="x", name="y", uid="z"))
    made = {"kind": "Service", "metadata": {"name": "llama"}}
    assert of_plan(Plan(delete=(gone,)), [made]) == [
        Event("Normal", "Created", "Apply", "created Service llama"),
        Event("Normal", "Deleted", "Delete", "deleted HorizontalPodAutoscaler llama"),
    ]
    books = {"kind": "ControllerRevision", "metadata": {"name": "llama-0123456789"}}
    assert of_plan(Plan(delete=(replace(gone, kind="ControllerRevision"),)), [books]) == []
