"""What can ail a pod: each ailment has its reason and its sentence, and leaves no trace when it is over."""

from typing import Any

import pytest
from tests.operator.conftest import (
    LATER,
    READY,
    REFUSAL,
    RUNNING,
    container,
    deployment,
    engine,
    pod,
    ready,
    statuses,
    tell,
    terminated,
    unscheduled,
    waiting,
)

from octavo_operator.api.status import InferenceServiceStatus

Json = dict[str, Any]


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
