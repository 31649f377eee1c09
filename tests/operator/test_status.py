"""What is told of a service: conditions, counts and facts, from plain objects as the API server gives them."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from tests.operator.conftest import (
    LATER,
    NOW,
    READY,
    REFUSAL,
    RUNNING,
    container,
    deployment,
    engine,
    frozen,
    pod,
    ready,
    service,
    statuses,
    tell,
    terminated,
    unscheduled,
    waiting,
)

from octavo_operator import diagnosis, names, status
from octavo_operator.api.status import InferenceServiceStatus
from octavo_operator.decide import Plan
from octavo_operator.errors import ApiError, Forbidden, Refused
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.resources import Key
from octavo_operator.rollout import Order

Json = dict[str, Any]


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


def test_a_pod_of_an_older_template_that_cannot_be_created_is_history_once_there_is_a_newer_one() -> None:
    def told(*pods: Pod, updated: int) -> str:
        message = 'pods "llama-old-x7k2p" is forbidden: exceeded quota: gpus, requested: 2, limited: 1'
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
        return ready(tell(*pods, there=deployment(1, updated=updated, conditions=[failure])))[1]

    assert told(updated=0) == "QuotaExceeded"
    assert told(pod(template="old"), updated=1) == "QuotaExceeded"  # it is one of several
    assert told(pod(template="new", **engine(RUNNING)), updated=1) == "Loading"


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


def test_a_rollout_that_is_too_late_says_so_unless_a_pod_is_pulling_or_loading() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    there = deployment(1, conditions=[late])
    assert ready(tell(pod(), there=there)) == (
        "False",
        "ProgressDeadlineExceeded",
        "no pod has become ready for too long: timed out",
    )
    assert ready(tell(pod(**engine(RUNNING)), there=there))[:2] == ("Unknown", "Loading")


def test_how_far_a_pull_or_a_load_is_is_told_and_of_several_pods_the_one_that_is_least_far() -> None:
    def told(*percents: int | None) -> str:
        pods = [replace(pod(f"p{i}", **engine(RUNNING)), percent=percent) for i, percent in enumerate(percents)]
        return ready(tell(*pods))[2]

    assert told(40) == "1 of 1 pods load the model: 40 %"
    assert told(90, 10) == "1 of 2 pods load the model: 10 %"
    assert told(40, 40) == "2 of 2 pods load the model: 40 %"
    assert told(None) == "1 of 1 pods load the model"


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
