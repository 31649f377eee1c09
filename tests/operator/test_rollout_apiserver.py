"""Rollouts and upgrades of the operator before a real API server: which pods are replaced, and in which order."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from octavo_cluster.playground import ENGINE_IMAGE, Playground, eventually
from octavo_operator import names

pytestmark = pytest.mark.apiserver

Json = dict[str, Any]


def image(playground: Playground) -> str:
    (container,) = playground.there("deployment")["spec"]["template"]["spec"]["containers"]
    return str(container["image"])


def revisions(playground: Playground) -> list[Json]:
    found: list[Json] = json.loads(playground.kubectl("get", "controllerrevisions", "--output=json"))["items"]
    return found


def test_another_operator_replaces_no_pod_until_it_is_asked(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(replicas=1)
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
    (kept,) = revisions(playground)
    generation = playground.there("deployment")["metadata"]["generation"]
    scope = f"--namespace={playground.namespace}"
    with playground.operator(scope, "--engine-image=octavo-engine:newer") as operator:
        eventually(lambda: playground.condition("UpdateAvailable").get("status") == "True", "the news")
        playground.apply(replicas=3)
        eventually(lambda: playground.there("deployment")["spec"]["replicas"] == 3, "3 replicas")
        assert image(playground) == ENGINE_IMAGE
        assert playground.there("ois")["status"]["engineImage"] == ENGINE_IMAGE
        assert playground.there("deployment")["metadata"]["generation"] == generation + 1
        operator.rest(reconciles=2)
        written = len(playground.audit())
        playground.kubectl("label", "ois", "llama", "touched=yes")
        operator.rest(reconciles=3)
        assert playground.audit()[written:] == []
        assert [each["metadata"]["name"] for each in revisions(playground)] == [kept["metadata"]["name"]]
        playground.kubectl("delete", "controllerrevision", kept["metadata"]["name"])
        eventually(lambda: len(revisions(playground)) == 1, "the revision back")
        operator.rest(reconciles=4)
        assert image(playground) == ENGINE_IMAGE
        assert playground.there("deployment")["metadata"]["generation"] == generation + 1
        playground.kubectl("annotate", "ois", "llama", f"{names.UPDATE_ANNOTATION}=1")
        eventually(lambda: image(playground) == "octavo-engine:newer", "the newer image")
        eventually(lambda: playground.condition("UpdateAvailable")["status"] == "False", "nothing newer")
        eventually(lambda: len(revisions(playground)) == 1, "the old revision gone")


def test_a_rollout_that_waits_for_gpus_of_the_old_pods_ends_one_first(playground: Playground) -> None:
    def surge() -> Any:
        return playground.there("deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]

    with playground.operator():
        playground.apply(accelerator={"type": "nvidia", "count": 1}, replicas=1)
        playground.await_ready("Unknown", "Starting")
        assert surge() == 1
        since = (datetime.now(UTC) - timedelta(seconds=17)).strftime("%Y-%m-%dT%H:%M:%SZ")
        scheduled = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "lastTransitionTime": since,
            "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
        }
        playground.play_pod("llama-2-a", {"phase": "Pending", "conditions": [scheduled]})
        playground.play_deployment_controller(replicas=2, ready=1, updatedReplicas=1)
        eventually(lambda: surge() == 0, "an old pod to end first")  # by itself, once 20 s are over
        eventually(
            lambda: playground.there("ois")["status"]["rollout"]["strategy"] == "replace", "the status to tell of it"
        )
        playground.kubectl("delete", "pod", "llama-2-a", "--grace-period=0", "--force")
        playground.play_deployment_controller(replicas=1, ready=1)
        eventually(lambda: surge() == 1, "the usual order again")
