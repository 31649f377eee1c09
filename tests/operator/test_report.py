"""What `kubectl octavo status` prints."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from octavo_cluster.playground import Playground
from octavo_operator import cli
from octavo_operator.report import report

Json = dict[str, Any]

PROGRAM: Final = Path(sys.executable).parent / "kubectl-octavo"


def service(*conditions: Json, generation: int = 1, **status: Any) -> Json:
    return {
        "metadata": {"name": "llama", "namespace": "models", "generation": generation},
        "spec": {"model": {"source": "hf://org/repo:model.gguf"}},
        "status": {"observedGeneration": 1, "conditions": list(conditions), **status} if conditions else {},
    }


def condition(type_: str, status: str, reason: str, message: str) -> Json:
    return {"type": type_, "status": status, "reason": reason, "message": message}


POD: Final = {
    "metadata": {"name": "llama-1-a"},
    "spec": {"nodeName": "node-1"},
    "status": {
        "phase": "Running",
        "containerStatuses": [{"name": "mesh", "ready": True}, {"name": "engine", "ready": False, "restartCount": 3}],
    },
}


def test_everything_that_is_known_is_on_one_page() -> None:
    broken = condition("Ready", "False", "DeviceMissing", "no CUDA device: set accelerator.type to cpu")
    text = report(
        service(
            broken,
            condition("Available", "False", "DeviceMissing", "no pod serves the model"),
            url="http://llama.models.svc/v1",
            replicas=1,
            readyReplicas=0,
            tensorParallelSize=2,
            model={"architecture": "llama", "layers": 30, "more": {"a": 1}},
            rollout={"strategy": "replace", "message": "no GPUs are free for one more pod"},
            engineImage="octavo/engine:1",
        ),
        [POD],
        [{"reason": "DeviceMissing", "note": "no CUDA device"}],
    )
    assert text.splitlines() == [
        "llama in models: not ready (DeviceMissing)",
        "  no CUDA device: set accelerator.type to cpu",
        "",
        "  Model    hf://org/repo:model.gguf",
        "           architecture llama, layers 30",
        "  URL      http://llama.models.svc/v1",
        "  Pods     0 of 1 serve",
        "  GPUs     2 share the model in each pod",
        "  Rollout  an old pod ends before a new one starts: no GPUs are free for one more pod",
        "  Image    octavo/engine:1",
        "",
        "  CONDITION  STATUS  REASON         MESSAGE",
        "  Available  False   DeviceMissing  no pod serves the model",
        "",
        "  POD        PHASE    READY  RESTARTS  NODE",
        "  llama-1-a  Running  no     3         node-1",
        "",
        "  EVENT          MESSAGE",
        "  DeviceMissing  no CUDA device",
    ]


def test_the_names_of_profiles_and_adapters_are_told() -> None:
    of = service(condition("Ready", "True", "Ready", "1 of 1 pods serve the model"))
    of["spec"]["profiles"] = [{"name": "support"}, {"name": "greedy"}]
    of["spec"]["adapters"] = [{"name": "sql", "source": "hf://org/sql-lora"}, {"name": "poet", "source": "pvc://a/b/"}]
    lines = report(of, [], []).splitlines()
    assert "  Profiles  support, greedy" in lines
    assert "  Adapters  sql, poet" in lines


def test_a_service_that_nobody_has_looked_at_says_so() -> None:
    first, *_ = report(service(), [], []).splitlines()
    assert first == "llama in models: no status yet; is the operator running, and does it serve this namespace?"


def test_a_status_of_an_older_spec_says_so() -> None:
    ready = condition("Ready", "True", "Ready", "1 of 1 pods serve the model")
    assert "has not looked at the newest change" in report(service(ready, generation=2), [], [])
    assert report(service(ready), [], []).startswith("llama in models: ready\n  1 of 1 pods serve the model\n")


def test_a_pod_on_its_way_out_and_one_that_has_just_been_made_have_their_lines() -> None:
    going = {"metadata": {"name": "old", "deletionTimestamp": "now"}, "status": {"phase": "Running"}}
    text = report(service(), [going, {"metadata": {"name": "new"}}], [])
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["old", "Terminating", "no", "0", "-"],
        ["new", "Pending", "no", "0", "-"],
    ]


def test_without_kubectl_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["status", "llama"]) == 1
    assert "kubectl octavo status: " in capsys.readouterr().err


@pytest.mark.apiserver
def test_the_command_asks_the_cluster(playground: Playground) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        kubectl = Path(playground.server.kubectl.command()[0])
        environment = {
            **os.environ,
            "PATH": f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}",
            "KUBECONFIG": str(playground.server.kubeconfig),
        }
        command = [str(PROGRAM), "status", name, f"--namespace={playground.namespace}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    playground.apply()
    state = {"name": "engine", "image": "e", "imageID": "", "ready": False, "restartCount": 2}
    playground.play_pod("llama-1-a", {"phase": "Running", "containerStatuses": [state]})
    answer = run("llama")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith(f"llama in {playground.namespace}: no status yet")
    assert answer.stdout.splitlines()[-1].split() == ["llama-1-a", "Running", "no", "2", "-"]
    nobody = run("nobody")
    assert nobody.returncode == 1
    assert 'inferenceservices.serving.octavo.dev "nobody" not found' in nobody.stderr
