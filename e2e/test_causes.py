"""What keeps a service from serving: the status names it and the way out, and it clears when it is mended.

All of them at once, so that they share their waits: one fixture makes every service of `CASES`, cures each as soon as
it tells its reason, and looks until each has gone on. To go on is to serve, or, where serving would take another start
of the engine and show no more, to be stopped by the next thing that is wrong.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from octavo_cluster import model, product, storage
from octavo_cluster.shell import wait_until
from octavo_cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Json = dict[str, Any]
Act: TypeAlias = "Callable[[Workspace, str], object]"  # given the case's namespace and the service's name

PATIENCE_SECONDS: Final = 240.0  # for all of them together, on two busy cores
PRODUCT: Final = "NVIDIA-H100-80GB-HBM3"
NO_FILE: Final = {"source": "pvc://models/nothing.gguf"}  # the engine refuses it at once: cheaper than to serve
NO_CLAIM: Final = {"source": f"pvc://nowhere/{model.FILE_NAME}"}
HUB: Final = {"source": f"hf://org/repo:{model.FILE_NAME}"}
HUB_ENV: Final = {"env": [{"name": "HF_ENDPOINT", "value": "http://hub:8080"}]}
SMALL: Final = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}


@dataclass(frozen=True)
class Case:
    """A service that something keeps from serving."""

    name: str
    spec: Json
    reason: str  # of Ready, until it is cured
    says: tuple[str, ...]  # parts of its message
    cure: Act
    then: str = "Ready"  # the reason once it is cured
    once_ready: Act | None = None  # what breaks it, where it serves at first
    in_quota: bool = False  # whether it is in the namespace without room for pods


def secret(name: str, key: str) -> Act:
    document = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {key: "s3cret"}}
    return lambda where, _: where.cluster.kubectl.apply(document, namespace=where.name)


def change(**spec: Any) -> Act:
    return lambda where, name: where.patch(name, spec)


def signal_engine(signal: str) -> Act:
    """Stop the engine process, or let it go on: the API process beside it answers all the while."""
    script = f'for p in /proc/[0-9]*; do grep -q octavo-engine $p/comm && kill -{signal} "${{p#/proc/}}"; done'

    def act(where: Workspace, name: str) -> None:
        where.kubectl("exec", f"deployment/{name}", "--container=engine", "--", "sh", "-c", script, check=False)

    return act


def gpus(count: int, **engine: str) -> Json:
    return {"accelerator": {"type": "nvidia", "count": count, "product": PRODUCT}, "engine": engine}


CASES: Final = (
    Case(
        "no-claim",
        {"model": {"source": f"pvc://late/{model.FILE_NAME}"}},
        "ModelSourceNotFound",
        ('PersistentVolumeClaim "late" does not exist', "create it, or correct spec.model.source"),
        lambda where, _: where.cluster.kubectl.apply(
            storage.claim("late", where.cluster.storage_class), namespace=where.name
        ),
        then="ModelNotFound",
    ),
    Case(
        "no-volume",
        {"model": {**HUB, "cache": {"size": "1Gi", "storageClassName": "late"}}, "pod": HUB_ENV},
        "VolumeNotBound",
        ("unbound immediate PersistentVolumeClaims", "spec.model.cache.storageClassName"),
        lambda where, _: storage.offer_volume(where.cluster, "late"),
    ),
    Case(
        "no-token",
        {"model": {**HUB, "tokenSecret": {"name": "hub-token"}}, "pod": HUB_ENV},
        "SecretNotFound",
        ('Secret "hub-token" does not exist: create it, or correct spec.model.tokenSecret',),
        secret("hub-token", "token"),
    ),
    Case(
        "no-key-in-secret",
        {
            "model": NO_FILE,
            "pod": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "half", "key": "b"}}}]},
        },
        "SecretNotFound",
        ('Secret "half" has no key "b": create it, or correct spec.pod.env',),
        secret("half", "b"),
        then="ModelNotFound",
    ),
    Case(
        "no-api-keys",
        {"model": NO_FILE, "endpoint": {"apiKeySecret": {"name": "keys"}}},
        "SecretNotFound",
        ('Secret "keys" does not exist: create it, or correct spec.endpoint.apiKeySecret',),
        secret("keys", "key"),
        then="ModelNotFound",
    ),
    Case(
        "no-account",
        {"model": NO_FILE},
        "ChildConflict",
        ('ServiceAccount "no-account-engine" exists already and does not belong to this InferenceService',),
        lambda where, name: where.kubectl("delete", "serviceaccount", f"{name}-engine"),
        then="ModelNotFound",
    ),
    Case(
        "no-image",
        {
            "model": NO_FILE,
            "engine": {"image": "127.0.0.1:1/octavo-engine:none"},
            "pod": {"imagePullSecrets": [{"name": "registry"}]},
        },
        "ImagePullFailed",
        (
            'the image "127.0.0.1:1/octavo-engine:none": its registry cannot be reached from the node',
            'the kubelet did not find the Secret "registry" of spec.pod.imagePullSecrets',
        ),
        change(engine={"image": None}),
        then="ModelNotFound",
    ),
    Case(
        "crashing",
        {"model": NO_FILE, "engine": {"extraArgs": ["--no-such-flag"]}},
        "ContainerCrashed",
        ('the container "engine"', "exit code 2", "unrecognized arguments: --no-such-flag"),
        change(engine={"extraArgs": []}),
        then="ModelNotFound",
    ),
    Case(
        "killed",
        {"resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "40Mi"}}},
        "OutOfMemory",
        ('ran out of memory in the container "engine": raise spec.resources.limits.memory',),
        change(resources={"limits": {"memory": "1Gi"}}),
    ),
    Case(
        "too-small",
        {"resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "256Mi"}}},
        "ModelDoesNotFit",
        ("MiB",),
        change(resources={"limits": {"memory": "1Gi"}}),
    ),
    Case(
        "stuck",
        {},
        "ReadinessFailing",
        ("have served the model and do not any more",),
        signal_engine("CONT"),
        once_ready=signal_engine("STOP"),
    ),
    Case(
        "no-quota",
        {"model": NO_CLAIM},
        "QuotaExceeded",
        ("exceeded quota: no-pods", "raise the ResourceQuota of namespace e2e-causes-quota"),
        lambda where, _: where.cluster.kubectl.apply(quota(pods=4), namespace=where.name),
        then="ModelSourceNotFound",
        in_quota=True,
    ),
    Case(
        "no-priority",
        {"model": NO_CLAIM, "pod": {"priorityClassName": "e2e-late"}},
        "AdmissionDenied",
        ("no PriorityClass with name e2e-late was found",),
        lambda where, _: where.cluster.kubectl.apply(
            {
                "apiVersion": "scheduling.k8s.io/v1",
                "kind": "PriorityClass",
                "metadata": {"name": "e2e-late"},
                "value": 1,
            }
        ),
        then="ModelSourceNotFound",
    ),
    Case(
        "denied",
        {"model": NO_CLAIM},
        "AdmissionDenied",
        ("e2e-teams", "every pod names its team"),
        change(pod={"labels": {"team": "search"}}),
        then="ModelSourceNotFound",
    ),
    Case(
        "no-device",
        gpus(1),
        "DeviceMissing",  # the pod is scheduled, but the GPU is only claimed to be there
        ("spec.engine.device cuda",),
        change(engine={"device": "cpu"}),
    ),
    Case(
        "no-split",
        gpus(2, device="cpu"),
        "HeadsNotDivisible",
        ("9 query heads", "use spec.accelerator.count 1 or 3"),
        change(accelerator={"count": 1}),
    ),
    Case(
        "no-gpus",
        {"model": NO_FILE, **gpus(16, device="cpu")},
        "Unschedulable",
        ("nvidia.com/gpu (16 a pod)", "Insufficient nvidia.com/gpu", "lower spec.accelerator.count"),
        lambda where, _: storage.pretend_gpus(where.cluster, 64, PRODUCT),
        then="ModelNotFound",
    ),
)
EACH_CASE: Final = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def quota(pods: int) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-pods"},
        "spec": {"hard": {"pods": str(pods)}},
    }


def policy() -> list[Json]:
    """Pods of the service `denied` need a label, says the cluster."""
    name = "e2e-teams"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    matches = {"objectSelector": {"matchLabels": {"serving.octavo.dev/service": "denied"}}, "resourceRules": [rule]}
    validation = {"expression": "'team' in object.metadata.labels", "message": "every pod names its team"}
    api = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    return [
        {
            **api,
            "kind": "ValidatingAdmissionPolicy",
            "spec": {"matchConstraints": matches, "validations": [validation]},
        },
        {
            **api,
            "kind": "ValidatingAdmissionPolicyBinding",
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        },
    ]


@dataclass
class Story:
    """What was told of a case: its condition Ready."""

    told: Json = field(default_factory=dict)  # when it had its reason
    cured: Json = field(default_factory=dict)  # when it had gone on after its cure
    last: Json = field(default_factory=dict)
    broken: bool = False  # where it had to serve first


@dataclass(frozen=True)
class Ward:
    """The two namespaces of the cases."""

    free: Workspace
    full: Workspace  # without room for pods

    def of(self, case: Case) -> Workspace:
        """Where the case is."""
        return self.full if case.in_quota else self.free

    def watch(self) -> dict[str, Story]:
        """Look until every case has been told and cured, or it takes too long."""
        stories = {case.name: Story() for case in CASES}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(story.cured for story in stories.values()) and time.monotonic() < deadline:
            seen = {**self.free.ready_conditions(), **self.full.ready_conditions()}
            for case in CASES:
                if case.name in seen:
                    self._go_on(case, stories[case.name], seen[case.name])
            time.sleep(0.5)  # between two looks
        return stories

    def _go_on(self, case: Case, story: Story, seen: Json) -> None:
        where, story.last = self.of(case), seen
        serves = seen["status"] == "True"
        if not story.told:
            if seen["reason"] == case.reason:
                story.told = seen
                case.cure(where, case.name)
            elif serves and case.once_ready is not None and not story.broken:
                story.broken = True
                case.once_ready(where, case.name)
        elif not story.cured and seen["reason"] == case.then:
            story.cured = seen
            if serves:  # and so makes room for those that still load
                where.kubectl("delete", "inferenceservice", case.name, "--wait=false")


@pytest.fixture(scope="module")
def ward(operator_installed: Cluster, product_images: tuple[Image, Image]) -> Iterator[Ward]:
    """Every case, applied at once."""
    cluster, engine = operator_installed, product_images[1]
    free = Workspace(cluster, "e2e-causes", engine)
    full = replace(free, name="e2e-causes-quota")
    for where in (free, full):
        product.make_namespace(cluster, where.name)
    storage.pretend_gpus(cluster, 8, PRODUCT)
    cluster.kubectl.apply(*policy())
    cluster.kubectl.apply(quota(pods=0), namespace=full.name)
    free.kubectl("create", "secret", "generic", "half", "--from-literal=a=1")
    free.kubectl("create", "serviceaccount", "no-account-engine")
    free.put_model("models")
    cluster.kubectl.apply(*storage.file_server("hub", "models", engine.reference), namespace=free.name)
    for where in (free, full):
        mine = [case for case in CASES if case.in_quota == (where is full)]
        where.apply_all({case.name: {"resources": SMALL, **case.spec} for case in mine})
    yield Ward(free, full)
    for kind in ("validatingadmissionpolicy", "validatingadmissionpolicybinding"):
        cluster.kubectl("delete", kind, "e2e-teams", "--ignore-not-found")
    cluster.kubectl("delete", "priorityclass", "e2e-late", "--ignore-not-found")
    for where in (free, full):
        cluster.kubectl("delete", "namespace", where.name, "--wait=false")


@pytest.fixture(scope="module")
def stories(ward: Ward) -> dict[str, Story]:
    """What was told of each case, by its name."""
    return ward.watch()


@EACH_CASE
def test_what_keeps_a_service_from_serving_is_told(stories: dict[str, Story], case: Case) -> None:
    story = stories[case.name]
    assert story.told.get("status") == "False", json.dumps(story.last)
    for part in case.says:
        assert part in story.told["message"]


@EACH_CASE
def test_its_cure_is_enough(stories: dict[str, Story], case: Case) -> None:
    story = stories[case.name]
    assert story.cured, json.dumps(story.last)


def test_a_file_that_arrives_is_enough(ward: Ward, stories: dict[str, Story]) -> None:
    assert model.FILE_NAME in stories["no-claim"].cured["message"]
    ward.free.put_model("late")
    ward.free.await_ready("no-claim")


def test_gpus_decide_limits_and_tensor_parallel_size(ward: Ward) -> None:
    service = ward.free.get("inferenceservice", "no-gpus")
    assert service is not None
    assert service["status"]["tensorParallelSize"] == 16
    deployment = ward.free.get("deployment", "no-gpus")
    assert deployment is not None
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "16"
    assert "--tensor-parallel-size=16" in container["args"]


def test_an_autoscaler_without_its_metrics_says_what_the_cluster_lacks(ward: Ward) -> None:
    lacks = {"cpu": "install metrics-server", "queue": "prometheus-adapter with the rules"}
    for metric in lacks:
        ward.free.apply(f"by-{metric}", model=NO_CLAIM, autoscaling={"maxReplicas": 3, "metric": metric})

    for metric, way_out in lacks.items():

        def missing(name: str = f"by-{metric}") -> str | None:
            condition = ward.free.condition(name, "Autoscaling")
            return None if condition.get("reason") == "NoMetricsAPI" else json.dumps(condition)

        wait_until(missing, what=f"by-{metric}: NoMetricsAPI", seconds=60, poll=0.5)
        assert way_out in ward.free.condition(f"by-{metric}", "Autoscaling")["message"]
        autoscaler = ward.free.get("horizontalpodautoscaler", f"by-{metric}")
        assert autoscaler is not None
        assert autoscaler["spec"]["scaleTargetRef"]["kind"] == "Deployment"
