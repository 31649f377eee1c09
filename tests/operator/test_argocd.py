"""Argo CD's health of a service over its whole life: manifests/argocd/health.lua, run by the Lua that Argo CD runs.

The statuses are those that the operator writes: of observed pods first, then of a live operator at a real API server.
"""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from lupa.lua51 import LuaRuntime
from tests.operator.conftest import (
    READY,
    REFUSAL,
    ROOT,
    RUNNING,
    container,
    deployment,
    engine,
    pod,
    service,
    tell,
    terminated,
    unscheduled,
)

from octavo_cluster import binaries, shell
from octavo_cluster.playground import ENGINE_IMAGE, Playground, eventually

Json = dict[str, Any]

FOLDER: Final = ROOT / "manifests" / "argocd"
HEALTH: Final = (FOLDER / "health.lua").read_text(encoding="utf-8")
KEY: Final = "resource.customizations.health.serving.octavo.dev_InferenceService"
GENERATION: Final = 4  # of the spec that the statuses below are about
NO_GPU: Final = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
REMOTE: Final[Json] = {"source": "hf://org/repo:model.gguf"}
PULLING: Final[Json] = {"phase": "Pending", "initContainerStatuses": [container(RUNNING, "pull")]}


def health(body: Json) -> tuple[str, str]:
    """What Argo CD shows of an object: the word and the sentence."""
    lua = LuaRuntime(register_eval=False)
    for library in ("python", "os", "io", "package", "require", "debug", "string", "table", "math"):
        lua.execute(f"{library} = nil")  # Argo CD gives its scripts none of them
    lua.globals()["obj"] = lua.table_from(body, recursive=True)
    told = lua.execute(HEALTH)
    return told["status"], told["message"]


def body(status: Json | None, **metadata: Any) -> Json:
    """An InferenceService with this status."""
    found: Json = {"metadata": {"name": "llama", "generation": GENERATION, **metadata}}
    return found if status is None else {**found, "status": status}


ALL_READY: Final = tell(pod(**READY), there=deployment(1, ready=1))

LIFE: Final[dict[str, tuple[Json | None, str, str]]] = {
    "created": (None, "Progressing", "has not seen this spec"),
    "its pod is made": (tell(pod()), "Progressing", "Starting"),
    "without a GPU": (tell(pod(**unscheduled(NO_GPU))), "Degraded", "nvidia.com/gpu"),
    "downloads": (tell(pod(**PULLING), of=service(model=REMOTE)), "Progressing", "Pulling"),
    "loads": (tell(pod(**engine(RUNNING))), "Progressing", "load the model"),
    "serves": (ALL_READY, "Healthy", "1 of 1"),
    "rolls out": (
        tell(pod("new", template="new"), pod("old", template="old", **READY), there=deployment(1, ready=1, updated=0)),
        "Progressing",
        "0 of 1 are of the latest version",
    ),
    "refuses to start": (tell(pod(**engine(terminated(REFUSAL)))), "Degraded", "set accelerator.type to cpu"),
    "suspended": (tell(of=service(replicas=0), there=deployment(0)), "Suspended", "Suspended"),
}


@pytest.mark.parametrize(("status", "expected", "words"), LIFE.values(), ids=LIFE)
def test_each_moment_of_a_services_life_has_its_health(status: Json | None, expected: str, words: str) -> None:
    word, sentence = health(body(status))

    assert word == expected, sentence
    assert words in sentence


def test_what_was_told_of_an_older_spec_is_no_health() -> None:
    assert health(body(ALL_READY, generation=GENERATION + 1))[0] == "Progressing"


def test_a_service_that_is_being_deleted_progresses_whatever_was_told_of_it() -> None:
    leaving = body(ALL_READY, deletionTimestamp="2026-01-02T03:04:05Z")

    assert health(leaving) == ("Progressing", "being deleted")


def test_a_status_without_our_condition_is_none() -> None:
    foreign = {**ALL_READY, "conditions": [{"type": "Foreign", "status": "True", "reason": "a", "message": "b"}]}

    assert health(body(foreign))[0] == "Progressing"


@pytest.mark.apiserver
def test_the_health_follows_a_live_service_from_its_making_to_its_end(playground: Playground) -> None:
    engine_container = {"name": "engine", "image": ENGINE_IMAGE, "imageID": "", "ready": False, "restartCount": 1}
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_GPU}
    crashed = {"exitCode": 2, "reason": "Error", "message": REFUSAL}
    back_off = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}

    def expect(word: str, words: str) -> None:
        def shown() -> tuple[str, str]:
            return health(playground.there("ois"))

        eventually(lambda: shown()[0] == word and words in shown()[1], f"{word}: {words}", lambda: str(shown()))

    playground.apply(model=REMOTE)
    expect("Progressing", "has not seen this spec")
    with playground.operator():
        expect("Progressing", "Starting")
        playground.play_deployment_controller(replicas=1, ready=0)
        playground.play_pod("llama-1-a", {"phase": "Pending", "conditions": [unschedulable]})
        expect("Degraded", "Unschedulable")
        scheduled = {"type": "PodScheduled", "status": "True"}
        pull = {**engine_container, "name": "pull", "state": RUNNING}
        playground.play_pod(
            "llama-1-a", {"phase": "Pending", "conditions": [scheduled], "initContainerStatuses": [pull]}
        )
        expect("Progressing", "Pulling")
        playground.play_deployment_controller(replicas=1, ready=1)
        expect("Healthy", "1 of 1 pods serve the model")
        playground.apply(model=REMOTE, engine={"maxModelLen": 64})
        expect("Progressing", "RollingOut")
        playground.play_deployment_controller(replicas=1, ready=0)
        container_status = {**engine_container, "state": back_off, "lastState": {"terminated": crashed}}
        playground.play_pod(
            "llama-1-b", {"phase": "Running", "conditions": [scheduled], "containerStatuses": [container_status]}
        )
        expect("Degraded", "DeviceMissing")
        playground.apply(model=REMOTE, replicas=0)
        expect("Suspended", "spec.replicas is 0")
        playground.patch("ois", {"metadata": {"finalizers": ["example.com/hold"]}})
        playground.kubectl("delete", "ois", "llama", "--wait=false")
        expect("Progressing", "being deleted")
        playground.patch("ois", {"metadata": {"finalizers": None}})
        eventually(lambda: playground.get("ois") is None, "its end")


@pytest.mark.apiserver
def test_kustomize_adds_the_health_to_the_settings_of_argocd(tmp_path: Path) -> None:
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm", "namespace": "argocd"}}
    (tmp_path / "argocd-cm.yaml").write_text(yaml.safe_dump({**settings, "data": {"url": "https://example.com"}}))
    (tmp_path / "octavo").symlink_to(FOLDER)
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["argocd-cm.yaml"], "components": ["octavo"]})
    )
    kubectl = binaries.ensure(["kubectl"]) / "kubectl"

    merged = shell.run([kubectl, "kustomize", "--load-restrictor=LoadRestrictionsNone", tmp_path])

    assert yaml.safe_load(merged.stdout)["data"] == {"url": "https://example.com", KEY: HEALTH}
