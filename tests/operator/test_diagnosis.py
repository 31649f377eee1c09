"""What keeps pods from serving, from the words in which Kubernetes says it: causes, and the field that mends them.

The words are those of Kubernetes 1.34's scheduler, kubelet and API server, recorded from the pods of
e2e/test_causes.py where it has the cause. test_status.py has what becomes of a finding.
"""

import json
from dataclasses import replace
from typing import Any, Final

import pytest

from octavo_operator import names
from octavo_operator.api.crd import custom_resource_definition
from octavo_operator.api.v1alpha1 import OWNED_FLAGS, InferenceService
from octavo_operator.diagnosis import FIELDS, Finding, diagnose, diagnose_creation
from octavo_operator.observe import Pod, hindrance, lost_pull_secrets

Json = dict[str, Any]

HUB: Final = {"source": "hf://org/repo:model.gguf"}


def service(**spec: Any) -> InferenceService:
    return InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "llama", "namespace": "models", "uid": "u", "generation": 4},
            "spec": {"model": {"source": "pvc://claim/model.gguf"}, **spec},
        }
    )


def pod(conditions: list[Json] | None = None, *, phase: str = "Pending", **containers: Json) -> Pod:
    """A pod whose containers have these states."""
    statuses = [
        {"name": name, "image": "octavo-engine:1", "ready": False, "state": state} for name, state in containers.items()
    ]
    return Pod.from_json(
        {
            "metadata": {"name": "p", "namespace": "models", "resourceVersion": "1", "labels": names.labels("llama")},
            "status": {"phase": phase, "conditions": conditions or [], "containerStatuses": statuses},
        }
    )


def unscheduled(message: str) -> Pod:
    return pod([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


def waiting(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def told(finding: Finding) -> tuple[str, str, str]:
    return finding.ready, finding.reason, finding.message("1 of 2 pods")


@pytest.mark.parametrize(
    ("spec", "message", "wait_for", "way_out"),
    [
        (
            {"accelerator": {"type": "nvidia", "count": 4}},
            (
                "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/2 "
                "nodes are available: 2 Preemption is not helpful for scheduling."
            ),
            "nvidia.com/gpu (4 a pod)",
            "lower spec.accelerator.count",
        ),
        (
            {"resources": {"requests": {"memory": "64Gi"}}},
            "0/1 nodes are available: 1 Insufficient memory.",
            "memory (64Gi a pod)",
            "lower spec.resources.requests",
        ),
        (
            {"resources": {"limits": {"cpu": "8"}}},
            "0/2 nodes are available: 1 Insufficient cpu, 1 Insufficient ephemeral-storage.",
            "cpu (8 a pod) and ephemeral-storage",
            "lower spec.resources.requests",
        ),
    ],
)
def test_what_no_node_has_enough_of_is_named_with_what_a_pod_wants(
    spec: Json, message: str, wait_for: str, way_out: str
) -> None:
    ready, reason, text = told(diagnose(unscheduled(message), service(**spec)))
    assert (ready, reason) == ("False", "Unschedulable")
    assert text.startswith(f"1 of 2 pods wait for {wait_for}: 0/")
    assert text.endswith(way_out)
    assert "reemption" not in text


def test_a_claim_that_is_missing_is_named_with_the_field_that_names_it() -> None:
    message = '0/1 nodes are available: persistentvolumeclaim "shared" not found. not found'
    cached = service(model={**HUB, "cache": {"claimName": "shared"}})
    assert told(diagnose(unscheduled(message), cached))[1:] == (
        "ModelSourceNotFound",
        (
            '1 of 2 pods cannot start: PersistentVolumeClaim "shared" does not exist in namespace models: create '
            "it, or correct spec.model.cache.claimName"
        ),
    )
    assert told(diagnose(unscheduled(message), service()))[2].endswith("correct spec.model.source")


@pytest.mark.parametrize(
    "message",
    [
        "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
        "0/1 nodes are available: 1 node(s) didn't find available persistent volumes to bind. preemption: 0/1 ...",
    ],
)
def test_a_volume_that_is_never_bound_is_told_and_where_to_look(message: str) -> None:
    _, reason, text = told(diagnose(unscheduled(message), service(model={**HUB, "cache": {"size": "1Gi"}})))
    assert reason == "VolumeNotBound"
    assert "not found" not in text
    assert "kubectl describe pvc --namespace models" in text
    assert "spec.model.cache.storageClassName" in text


@pytest.mark.parametrize(
    ("message", "detail", "field"),
    [
        ('secret "hub" not found', 'Secret "hub" does not exist', "spec.model.tokenSecret"),
        ("couldn't find key token in Secret models/hub", 'Secret "hub" has no key "token"', "spec.model.tokenSecret"),
        ('configmap "proxy" not found', 'ConfigMap "proxy" does not exist', "spec.pod.env"),
        ("couldn't find key a in ConfigMap models/proxy", 'ConfigMap "proxy" has no key "a"', "spec.pod.env"),
    ],
)
def test_a_secret_that_is_missing_is_named_with_the_field_that_names_it(message: str, detail: str, field: str) -> None:
    of = service(model={**HUB, "tokenSecret": {"name": "hub"}})
    assert told(diagnose(pod(pull=waiting("CreateContainerConfigError", message)), of)) == (
        "False",
        "SecretNotFound",
        f"1 of 2 pods cannot start: {detail}: create it, or correct {field}",
    )


BUCKET: Final = {"model": {"source": "s3://bucket/model.gguf", "credentialsSecret": {"name": "s3"}}}
REGISTRY: Final = {
    "model": {"source": "oci://host/repository", "credentialsSecret": {"name": "login"}},
    "endpoint": {"apiKeySecret": {"name": "keys"}},
}


@pytest.mark.parametrize(
    ("spec", "message", "detail"),
    [
        (BUCKET, 'secret "s3" not found', 'Secret "s3" does not exist'),
        (
            BUCKET,
            "couldn't find key AWS_SECRET_ACCESS_KEY in Secret models/s3",
            'Secret "s3" has no key "AWS_SECRET_ACCESS_KEY"',
        ),
        (
            REGISTRY,
            'MountVolume.SetUp failed for volume "credentials" : secret "login" not found',
            'Secret "login" does',
        ),
        (
            REGISTRY,
            'MountVolume.SetUp failed for volume "credentials" : references non-existent secret key: .dockerconfigjson',
            'Secret "login" has no key ".dockerconfigjson"',
        ),
    ],
)
def test_credentials_that_are_missing_are_named(spec: Json, message: str, detail: str) -> None:
    stuck = pod(pull=waiting("CreateContainerConfigError", message))
    if "MountVolume" in message:
        stuck = replace(SILENT, hindrance=hindrance(events(("FailedMount", message))))
    _, reason, text = told(diagnose(stuck, service(**spec)))
    assert reason == "SecretNotFound"
    assert detail in text
    assert text.endswith("create it, or correct spec.model.credentialsSecret")


def pulling(states: dict[str, Json]) -> Pod:
    """A pod whose init containers have these states."""
    statuses = [
        {"name": name, "image": "octavo-engine:1", "ready": False, "state": each} for name, each in states.items()
    ]
    return Pod.from_json(
        {
            "metadata": {"name": "p", "namespace": "models", "resourceVersion": "1", "labels": names.labels("llama")},
            "status": {"phase": "Pending", "podIP": "10.0.0.1", "initContainerStatuses": statuses},
        }
    )


ADAPTERS: Final = {
    "model": {"source": "hf://org/repo:m.gguf"},
    "adapters": [
        {"name": "poet", "source": "pvc://late/poet/"},
        {"name": "sql", "source": "hf://org/sql-lora", "tokenSecret": {"name": "hub"}},
        {"name": "chess", "source": "oci://registry.example/chess", "credentialsSecret": {"name": "login"}},
    ],
}


@pytest.mark.parametrize(
    ("stuck", "text"),
    [
        (
            unscheduled('persistentvolumeclaim "late" not found'),
            (
                'PersistentVolumeClaim "late" does not exist in namespace models: create it, or correct the source of '
                "poet in spec.adapters"
            ),
        ),
        (
            pulling({"pull-adapter-1": waiting("CreateContainerConfigError", 'secret "hub" not found')}),
            'Secret "hub" does not exist: create it, or correct the tokenSecret of sql in spec.adapters',
        ),
        (
            replace(
                pod(engine=waiting("ContainerCreating")),
                hindrance='MountVolume.SetUp failed for volume "credentials-2" : references non-existent secret key: '
                ".dockerconfigjson",
            ),
            (
                'Secret "login" has no key ".dockerconfigjson": create it, or correct the credentialsSecret of chess '
                "in spec.adapters"
            ),
        ),
    ],
)
def test_what_an_adapter_lacks_is_told_by_its_name(stuck: Pod, text: str) -> None:
    status, _, message = told(diagnose(stuck, service(**ADAPTERS)))
    assert status == "False"
    assert message == f"1 of 2 pods cannot start: {text}"


def test_a_pod_tells_what_it_pulls_and_loads_once_all_is_there() -> None:
    running: Json = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    done: Json = {"terminated": {"exitCode": 0}}
    states = [[running, waiting("x"), waiting("x")], [done, running, waiting("x")], [done, done, running], [done] * 3]
    names_of = ("pull", "pull-adapter-1", "pull-adapter-2")
    messages = [
        told(diagnose(pulling(dict(zip(names_of, each, strict=True))), service(**ADAPTERS)))[2] for each in states
    ]
    assert messages == [
        "1 of 2 pods pull the model from hf://org/repo:m.gguf",
        "1 of 2 pods pull the adapter sql from hf://org/sql-lora",
        "1 of 2 pods pull the adapter chess from oci://registry.example/chess",
        "1 of 2 pods load the model",
    ]
    assert pulling({"pull-adapter-1": running}).loads_in == "pull-adapter-1"


def events(*pairs: tuple[str, str]) -> list[Json]:
    """Events of a pod in the order in which they came, told newest first."""
    return [
        {"reason": reason, "note": note, "eventTime": None, "deprecatedLastTimestamp": f"2026-01-01T00:00:0{second}Z"}
        for second, (reason, note) in reversed(list(enumerate(pairs)))
    ]


SILENT: Final = pod(engine=waiting("ContainerCreating"))
MOUNT: Final = 'MountVolume.SetUp failed for volume "api-keys" : '


@pytest.mark.parametrize(
    ("note", "reason", "text"),
    [
        (
            f'{MOUNT}secret "keys" not found',
            "SecretNotFound",
            'Secret "keys" does not exist: create it, or correct spec.endpoint.apiKeySecret',
        ),
        (
            f"{MOUNT}references non-existent secret key: all",
            "SecretNotFound",
            'Secret "keys" has no key "all": create it, or correct spec.endpoint.apiKeySecret',
        ),
        (
            'MountVolume.MountDevice failed for volume "pvc-1" : rpc error: no such host',
            "VolumeMountFailed",
            'MountVolume.MountDevice failed for volume "pvc-1" : rpc error: no such host',
        ),
    ],
)
def test_a_volume_that_cannot_be_mounted_is_told_by_events_alone(note: str, reason: str, text: str) -> None:
    of = service(endpoint={"apiKeySecret": {"name": "keys", "key": "all"}})
    assert SILENT.is_silent
    stuck = replace(SILENT, hindrance=hindrance(events(("Scheduled", "assigned"), ("FailedMount", note))))
    assert told(diagnose(stuck, of)) == ("False", reason, f"1 of 2 pods cannot start: {text}")


def test_the_engines_words_name_fields_in_place_of_flags() -> None:
    message = "9 query heads; use --tensor-parallel-size 1 or 3, or --kv-cache-memory-bytes"
    refusal = json.dumps({"reason": "HeadsNotDivisible", "message": message, "facts": {}})
    state = {"terminated": {"exitCode": 1, "reason": "Error", "message": refusal}}
    assert told(diagnose(pod(engine=state), service())) == (
        "False",
        "HeadsNotDivisible",
        "9 query heads; use spec.accelerator.count 1 or 3, or --kv-cache-memory-bytes",
    )


def test_every_field_that_stands_for_a_flag_is_one() -> None:
    assert FIELDS.keys() <= set(OWNED_FLAGS)
    root = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path in FIELDS.values():
        schema = root
        for part in path.split("."):
            schema = schema["properties"][part]


@pytest.mark.parametrize("message", ["[" * 4096, '{"a":' * 800, "{}", '{"reason": 1}', '{"reason": "no word"}'])
def test_a_container_may_leave_any_message_behind(message: str) -> None:
    state = {"terminated": {"exitCode": 1, "reason": "Error", "message": message}}
    assert told(diagnose(pod(engine=state), service()))[1] == "ContainerCrashed"


LOGIN: Final = (
    "its registry wants a login, or does not have it: name a Secret with the login in spec.pod.imagePullSecrets"
)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            'failed to pull and unpack image "r/o:1": failed to resolve reference "r/o:1": r/o:1: not found',
            "its registry does not have it: correct spec.engine.image",
        ),
        (
            "failed to authorize: failed to fetch oauth token: unexpected status from GET request: 401 Unauthorized",
            LOGIN,
        ),
        (
            'failed to do request: Head "http://127.0.0.1:1/v2/o/manifests/1": dial tcp: connect: connection refused',
            "its registry cannot be reached from the node",
        ),
        (
            'Failed to apply default image tag "r//x": couldn\'t parse image name "r//x": invalid reference format',
            "that is no image's name: correct spec.engine.image",
        ),
        ("something new", "check that it exists, and spec.pod.imagePullSecrets if its registry wants a login"),
    ],
)
@pytest.mark.parametrize("again", ["", 'Back-off pulling image "octavo-engine:1": ErrImagePull: '])
def test_why_an_image_cannot_be_pulled_is_told_alike_at_each_attempt(said: str, meant: str, again: str) -> None:
    reason = "ImagePullBackOff" if again else "ErrImagePull"
    _, told_reason, text = told(diagnose(pod(engine=waiting(reason, again + said)), service()))
    assert (told_reason, text) == ("ImagePullFailed", f'1 of 2 pods cannot pull the image "octavo-engine:1": {meant}')


def test_a_missing_secret_of_a_registry_is_told_from_events_as_long_as_the_spec_names_it() -> None:
    note = "Unable to retrieve some image pull secrets (regcred, other); attempting to pull the image may not succeed."
    lost = lost_pull_secrets(events(("FailedToRetrieveImagePullSecret", note), ("BackOff", "x")))
    assert lost == ("other", "regcred")
    stuck = replace(pod(engine=waiting("ErrImagePull", "x: not found")), lost_pull_secrets=lost)
    assert stuck.cannot_pull
    names_it = service(pod={"imagePullSecrets": [{"name": "regcred"}]})
    said = '; the kubelet did not find the Secret "regcred" of spec.pod.imagePullSecrets'
    assert told(diagnose(stuck, names_it))[2].endswith(said)
    assert "Secret" not in told(diagnose(stuck, service()))[2]


def test_a_pod_that_went_on_after_a_failed_mount_is_not_held_against() -> None:
    assert hindrance(events(("FailedMount", "x"), ("Pulling", "the image"))) == ""
    assert hindrance([]) == ""
    again = {"reason": "FailedMount", "note": "again", "series": {"lastObservedTime": "2026-01-01T00:00:09Z"}}
    assert hindrance([*events(("Pulling", "the image")), again]) == "again"
    assert told(diagnose(SILENT, service()))[1] == "Starting"


def test_only_a_pod_with_a_node_and_nothing_to_say_is_silent() -> None:
    assert not pod(engine=waiting("ImagePullBackOff")).is_silent
    assert not pod(engine={"running": {"startedAt": "2026-01-01T00:00:00Z"}}).is_silent
    assert not unscheduled("0/1 nodes are available.").is_silent
    assert not pod(phase="Running", engine=waiting("ContainerCreating")).is_silent
    assert pod(pull=waiting("PodInitializing"), engine=waiting("PodInitializing")).is_silent


def test_an_engine_that_was_ready_and_is_not_any_more_is_told() -> None:
    running: Json = {"running": {"startedAt": "2026-01-01T00:01:00Z"}}

    def since(time: str) -> str:
        conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": time}]
        return diagnose(pod(conditions, phase="Running", engine=running), service()).reason

    assert since("2026-01-01T00:00:30Z") == "Loading"  # not ready since before this run of the container
    assert since("2026-01-01T00:05:00Z") == "ReadinessFailing"


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        (
            (
                'pods "llama-6d4cf56db6-x7k2p" is forbidden: exceeded quota: gpus, requested: '
                "requests.nvidia.com/gpu=2, used: requests.nvidia.com/gpu=3, limited: requests.nvidia.com/gpu=4"
            ),
            "QuotaExceeded",
            "exceeded quota: gpus, requested: requests.nvidia.com/gpu=2, limited: requests.nvidia.com/gpu=4: raise",
        ),
        (
            'admission webhook "images.example.com" denied the request: image is not signed',
            "AdmissionDenied",
            'admission webhook "images.example.com" denied the request: image is not signed',
        ),
        (
            'pods "llama-6d4cf56db6-x7k2p" is forbidden: violates PodSecurity "restricted:latest": x',
            "AdmissionDenied",
            'violates PodSecurity "restricted:latest": x',
        ),
        (
            (
                "pods \"llama-6d4cf56db6-x7k2p\" is forbidden: ValidatingAdmissionPolicy 'teams' with binding "
                "'teams' denied request: every pod names its team"
            ),
            "AdmissionDenied",
            "ValidatingAdmissionPolicy 'teams' with binding 'teams' denied request: every pod names its team",
        ),
        (
            'pods "llama-6d4cf56db6-" is forbidden: no PriorityClass with name high was found',
            "AdmissionDenied",
            "no PriorityClass with name high was found",
        ),
        (
            (
                'pods "llama-6d4cf56db6-x7k2p" is forbidden: error looking up service account models/llama-engine: '
                'serviceaccount "llama-engine" not found'
            ),
            "PodsForbidden",
            'serviceaccount "llama-engine" not found',
        ),
    ],
)
def test_why_pods_cannot_be_created_is_named_without_what_changes(message: str, reason: str, detail: str) -> None:
    ready, told_reason, text = told(diagnose_creation(message, service()))
    assert (ready, told_reason) == ("False", reason)
    assert detail in text
    assert "x7k2p" not in text
    assert "used:" not in text
