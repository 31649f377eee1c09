"""Children that not every service or not every cluster has, against a real API server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from octavo_cluster.playground import Playground, eventually
from octavo_operator.resources import POD_MONITOR, SCALED_OBJECT, Resource

pytestmark = pytest.mark.apiserver

ELASTIC: Final[dict[str, Any]] = {"autoscaling": {"maxReplicas": 9}, "resources": {"requests": {"cpu": "1"}}}
CACHE: Final = "llama-model-cache"
PROFILES: Final = "llama-profiles"


def definition(resource: Resource) -> dict[str, Any]:
    """A CRD of the kind that takes anything: enough to be served."""
    group, version = resource.api_version.split("/")
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": resource.kind, "plural": resource.plural},
            "versions": [
                {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}},
            ],
        },
    }


@contextmanager
def installed(playground: Playground, *resources: Resource) -> Iterator[None]:
    """The cluster has these kinds, until the end of the block."""
    kubectl = playground.server.kubectl
    documents = [definition(resource) for resource in resources]
    names = [f"crd/{document['metadata']['name']}" for document in documents]
    kubectl("create", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))
    try:
        kubectl("wait", *names, "--for=condition=Established", "--timeout=30s")
        yield
    finally:
        kubectl("delete", *names, "--timeout=60s")


def test_kinds_that_are_installed_later_are_used_and_given_up_when_they_go(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(**ELASTIC)
        eventually(lambda: playground.get("hpa") is not None, "an autoscaler")
        with installed(playground, POD_MONITOR, SCALED_OBJECT):
            eventually(lambda: playground.get("podmonitor") is not None, "a PodMonitor", seconds=40)
            eventually(lambda: playground.get("scaledobject") is not None, "a ScaledObject", seconds=40)
            eventually(lambda: playground.get("hpa") is None, "no other autoscaler")
            assert playground.there("podmonitor")["metadata"]["ownerReferences"]
            assert (
                "replicas" not in playground.there("deployment")["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"]
            )
            playground.patch("podmonitor", {"spec": {"podMetricsEndpoints": []}})
            eventually(lambda: playground.there("podmonitor")["spec"]["podMetricsEndpoints"] != [], "the endpoint back")
            operator.rest(reconciles=3)
            written = len(playground.audit())
            playground.kubectl("label", "ois", "llama", "touched=yes")
            operator.rest(reconciles=4)
            assert playground.audit()[written:] == []
        eventually(lambda: playground.get("hpa") is not None, "the autoscaler back", seconds=40)


def test_kinds_that_are_there_first_are_used_from_the_start(playground: Playground) -> None:
    with installed(playground, POD_MONITOR, SCALED_OBJECT), playground.operator():
        playground.apply(**ELASTIC)
        eventually(lambda: playground.get("scaledobject") is not None, "a ScaledObject")
        eventually(lambda: playground.get("podmonitor") is not None, "a PodMonitor")
        kinds = {line["objectRef"]["resource"] for line in playground.audit()}
        assert "horizontalpodautoscalers" not in kinds


def test_a_cache_comes_with_its_field_comes_back_and_goes_with_its_field(playground: Playground) -> None:
    remote = {"source": "hf://org/repo:model.gguf"}
    with playground.operator() as operator:
        playground.apply(model={**remote, "cache": {"size": "1Gi"}})
        eventually(lambda: playground.get("persistentvolumeclaim", CACHE) is not None, "a claim")
        claim = playground.there("persistentvolumeclaim", CACHE)
        assert claim["metadata"]["ownerReferences"][0]["kind"] == "InferenceService"
        operator.rest(reconciles=2)
        written = len(playground.audit())
        playground.kubectl("label", "ois", "llama", "touched=yes")
        operator.rest(reconciles=3)
        assert playground.audit()[written:] == []
        uid = claim["metadata"]["uid"]
        # No controller lifts the finalizer that protects claims in use.
        playground.kubectl("delete", "pvc", CACHE, "--wait=false")
        playground.patch("persistentvolumeclaim", {"metadata": {"finalizers": None}}, CACHE)
        eventually(lambda: playground.uid("persistentvolumeclaim", CACHE) not in {uid, None}, "a new claim")
        playground.apply(model=remote)
        eventually(
            lambda: "deletionTimestamp" in playground.there("persistentvolumeclaim", CACHE)["metadata"], "no claim"
        )


def test_profiles_come_with_their_field_are_healed_and_replace_no_pod_when_they_change(playground: Playground) -> None:
    def text() -> str:
        return str((playground.get("configmap", PROFILES) or {}).get("data", {}).get("profiles.yaml"))

    with playground.operator() as operator:
        playground.apply(profiles=[{"name": "support", "system": "You are kind."}])
        eventually(lambda: "You are kind." in text(), "a ConfigMap")
        operator.rest(reconciles=2)
        generation = playground.there("deployment")["metadata"]["generation"]
        playground.apply(profiles=[{"name": "support", "system": "You are brief."}])
        eventually(lambda: "You are brief." in text(), "the other text")
        playground.patch("configmap", {"data": {"profiles.yaml": "[]"}}, PROFILES)
        eventually(lambda: "You are brief." in text(), "the text back")
        operator.rest(reconciles=4)
        assert playground.there("deployment")["metadata"]["generation"] == generation
        playground.apply()
        eventually(lambda: playground.get("configmap", PROFILES) is None, "no ConfigMap")


def test_a_volume_that_cannot_be_mounted_is_told_from_the_pods_events_and_forgotten(playground: Playground) -> None:
    regarding = {"apiVersion": "v1", "kind": "Pod", "namespace": playground.namespace, "name": "llama-1-a"}
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "llama-1-a.1"},
        "regarding": regarding,
        "reason": "FailedMount",
        "note": 'MountVolume.SetUp failed for volume "api-keys" : secret "keys" not found',
        "type": "Warning",
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "action": "Mount",
        "reportingController": "kubelet",
        "reportingInstance": "node-1",
    }
    playground.kubectl("create", "--filename=-", document=event)
    state: dict[str, Any] = {"name": "engine", "image": "e", "imageID": "", "ready": False, "restartCount": 0}
    scheduled = [{"type": "PodScheduled", "status": "True"}]
    with playground.operator():
        playground.apply(endpoint={"apiKeySecret": {"name": "keys"}})
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=0)
        creating = {**state, "state": {"waiting": {"reason": "ContainerCreating"}}}
        status = {"phase": "Pending", "conditions": scheduled, "containerStatuses": [creating]}
        playground.play_pod("llama-1-a", status)
        told = playground.await_ready("False", "SecretNotFound")
        assert told["message"].endswith(
            'Secret "keys" does not exist: create it, or correct spec.endpoint.apiKeySecret'
        )
        running = {**state, "state": {"running": {"startedAt": "2026-01-01T00:00:09Z"}}}
        playground.play_pod("llama-1-a", {"phase": "Running", "conditions": scheduled, "containerStatuses": [running]})
        playground.await_ready("Unknown", "Loading")
