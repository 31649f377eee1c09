"""The cluster in Docker, by its command lines: programs that write down their calls stand in for the real ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from octavo_cluster import backend, binaries, paths
from octavo_cluster.host import HostCluster
from octavo_cluster.kind import KindCluster, kind_config
from octavo_cluster.recipe import Image

if TYPE_CHECKING:
    from pathlib import Path

# Every program is this script under its name. `get clusters` answers with the clusters of a file, which create and
# delete change; `port-forward` answers as kubectl does and stays.
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
case "$(basename "$0") $*" in
    "kind get clusters") cat "{clusters}" ;;
    "kind create cluster"*) echo octavo > "{clusters}" ;;
    "kind delete cluster"*) : > "{clusters}" ;;
    "kind get kubeconfig"*) echo "{{}}" ;;
    *port-forward*) echo "Forwarding from 127.0.0.1:40213 -> 8000"; exec sleep 60 ;;
esac
"""


class Programs:
    """A machine on which Docker answers and every program only writes down its call."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "calls"
        self.clusters = folder / "clusters"
        self.clusters.touch()
        self._script = RECORDER.format(log=self.log, clusters=self.clusters)

    def put(self, path: Path) -> None:
        """Put a program at a path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._script)
        path.chmod(0o755)

    def calls(self) -> list[str]:
        """The command lines since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=":")
    for name in ("kind", "docker"):
        programs.put(tmp_path / "path" / name)
    for name in binaries.CLIENTS:
        programs.put(binaries.folder() / name)
    return programs


def kubectl(arguments: str) -> str:
    options = f"--kubeconfig={paths.kubeconfig_path()} --cache-dir={paths.state_dir()}/kubectl-cache"
    return f"kubectl {options} {arguments}"


READY = "wait --for=condition=Ready node/octavo-control-plane --timeout=5s"


def test_kind_is_chosen_where_docker_answers(programs: Programs) -> None:
    assert isinstance(backend.choose(), KindCluster)
    assert programs.calls() == ["docker info"]


def test_the_machine_itself_is_chosen_where_docker_does_not_answer(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "path" / "docker").write_text("#!/bin/sh\necho cannot connect >&2\nexit 1\n")
    assert isinstance(backend.choose(), HostCluster)


def test_up_creates_the_cluster_once(programs: Programs) -> None:
    cluster = KindCluster()
    cluster.up()
    config, image = paths.state_dir() / "kind.json", f"--image=kindest/node:{binaries.KUBERNETES}"
    assert programs.calls() == [
        "kind get clusters",
        f"kind create cluster --config={config} {image} --kubeconfig={paths.kubeconfig_path()} --wait=120s",
    ]
    assert json.loads(config.read_text()) == json.loads(kind_config())

    cluster.up()
    assert programs.calls() == ["kind get clusters", "kind get kubeconfig --name=octavo", kubectl(READY)]


def test_down_deletes_it_and_leaves_no_file(programs: Programs) -> None:
    cluster = KindCluster()
    cluster.up()
    programs.calls()
    cluster.down()
    assert programs.calls() == [f"kind delete cluster --name=octavo --kubeconfig={paths.kubeconfig_path()}"]
    assert not paths.state_dir().exists()
    assert cluster.status().health == "absent"


def test_an_image_is_loaded_from_docker(programs: Programs) -> None:
    KindCluster().load_image(Image("octavo/engine", "abc"))
    assert programs.calls() == ["kind load docker-image docker.io/octavo/engine:abc --name=octavo"]


def test_a_service_is_reached_through_a_forwarded_port(programs: Programs) -> None:
    with KindCluster().reach("demo", "smollm2") as url:
        assert url == "http://127.0.0.1:40213"
    assert programs.calls() == [kubectl("port-forward --namespace=demo service/smollm2 :80")]
