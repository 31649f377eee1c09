"""`kubectl octavo plan`: what would change, by fields; and on a real API server, which judges it and stores nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from octavo_cluster.playground import ENGINE_IMAGE, Playground, eventually
from octavo_operator import names
from octavo_operator.preview import differences

Json = dict[str, Any]

PROGRAM: Final = Path(sys.executable).with_name("kubectl-octavo")


def test_equal_objects_do_not_differ() -> None:
    assert list(differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]})) == []


def test_a_difference_is_told_by_the_path_to_it() -> None:
    before = {"spec": {"replicas": 1, "paused": True}}
    after = {"spec": {"replicas": 2, "strategy": {"type": "Recreate"}}}
    assert list(differences(before, after)) == [
        ("spec.replicas", 1, 2),
        ("spec.paused", True, None),
        ("spec.strategy", None, {"type": "Recreate"}),
    ]


def test_items_that_have_names_are_compared_by_them_wherever_they_stand() -> None:
    before = {"containers": [{"name": "engine", "image": "a"}, {"name": "mesh", "image": "m"}]}
    after = {"containers": [{"name": "mesh", "image": "m"}, {"name": "engine", "image": "b"}]}
    assert list(differences(before, after)) == [("containers[engine].image", "a", "b")]


def plan(playground: Playground, *arguments: str, name: str = "llama", **spec: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as kubectl does, on an InferenceService of this spec."""
    kubectl = Path(playground.server.kubectl.command()[0])
    environment = {
        **os.environ,
        "PATH": f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}",
        "KUBECONFIG": str(playground.server.kubeconfig),
    }
    document = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {"model": {"source": "pvc://models/model.gguf"}, **spec},
    }
    where = f"--namespace={playground.namespace}"
    command = [str(PROGRAM), "plan", "--filename=-", where, *arguments]
    text = json.dumps(document)
    return subprocess.run(command, env=environment, input=text, capture_output=True, text=True, check=False)


def lines(playground: Playground, *arguments: str, **spec: Any) -> list[str]:
    done = plan(playground, f"--engine-image={ENGINE_IMAGE}", *arguments, **spec)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.apiserver
def test_what_is_not_there_yet_is_told_as_created_and_is_not_created(playground: Playground) -> None:
    told = lines(playground, replicas=2)

    assert told[0] == f"llama in {playground.namespace} would change:"
    created = [line.split(":")[0].strip() for line in told[1:] if line.endswith(": created")]
    assert created[0] == "InferenceService llama"
    assert {"Deployment llama", "Service llama", "ServiceAccount llama-engine"} <= set(created)
    assert playground.get("ois") is None
    assert playground.get("deployment") is None


@pytest.mark.apiserver
def test_what_is_there_is_told_field_by_field_and_stays(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply(replicas=1)
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
    playground.play_pod("llama-1-a", {"phase": "Running"})
    before = playground.there("deployment")["metadata"]["resourceVersion"]

    assert lines(playground, replicas=1) == [f"llama in {playground.namespace}: nothing would change"]
    assert lines(playground, replicas=3) == [
        f"llama in {playground.namespace} would change:",
        "  InferenceService llama: changed",
        "    spec.replicas: 1 -> 3",
        "  Deployment llama: changed",
        "    spec.replicas: 1 -> 3",
    ]
    told = lines(playground, replicas=1, engine={"maxModelLen": 2048})
    assert "    spec.template.spec.containers[engine].args: +--max-model-len=2048" in told
    assert told[-1].startswith("  Pods: each of the 1 is replaced; a new one comes first: ")
    # Another operator's image replaces no pod by itself.
    assert lines(playground, "--engine-image=octavo-engine:newer", replicas=1)[0].endswith("nothing would change")
    elastic = {"autoscaling": {"maxReplicas": 4}, "resources": {"requests": {"cpu": "1"}}}
    assert "  HorizontalPodAutoscaler llama: created" in lines(playground, **elastic)
    assert playground.there("deployment")["metadata"]["resourceVersion"] == before


@pytest.mark.apiserver
def test_what_the_server_refuses_and_who_is_in_the_way_is_told(playground: Playground) -> None:
    refused = plan(playground, replicas=-1)
    assert refused.returncode == 1
    assert "spec.replicas" in refused.stderr

    playground.kubectl("create", "service", "clusterip", "llama", "--tcp=80")
    assert "  Service llama: left alone, it belongs to somebody else" in lines(playground)


@pytest.mark.apiserver
def test_the_operators_own_deployment_says_what_it_renders(playground: Playground) -> None:
    labels = {names.NAME_LABEL: "octavo", names.COMPONENT_LABEL: "operator"}
    arguments = ["--engine-image=octavo-engine:told", f"--namespace={playground.namespace}"]
    container = {"name": "operator", "image": "o", "args": arguments}
    document = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "operator", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }
    with playground.operator():
        playground.apply(replicas=1)
        playground.await_ready("Unknown", "Starting")
    assert "octavo-engine:told" not in plan(playground, replicas=1, engine={"maxModelLen": 64}).stdout
    playground.kubectl("create", "--filename=-", document=document)

    def told() -> str:
        return plan(playground, replicas=1, engine={"maxModelLen": 64}).stdout

    eventually(lambda: f"image: {ENGINE_IMAGE} -> octavo-engine:told" in told(), "the operator's image", told)
