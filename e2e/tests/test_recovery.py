"""The cluster made of this machine: it survives any crash, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from octavo_cluster import binaries, images, shell
from octavo_cluster.errors import HarnessError, NotReady
from octavo_cluster.host import HostCluster
from octavo_cluster.host_node import KUBELET_SYSCTLS, HostNode
from octavo_cluster.site import Site
from octavo_cluster.start import Start

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Beside the cluster of the other tests, and of a demo that somebody may have left up.
SITE = Site(
    name="octavo-recovery",
    interface="octavo1",
    pods=IPv4Network("10.89.0.0/24"),
    services=IPv4Network("10.97.0.0/16"),
    uplink=IPv4Network("10.89.255.0/30"),
)


@pytest.fixture
def machine_cluster(tmp_path: Path) -> Iterator[HostCluster]:
    cluster = HostCluster(SITE, tmp_path / "kubeconfig")
    cluster.down()  # what an earlier run may have left
    yield cluster
    cluster.down()


def processes() -> dict[int, str]:
    """The site's processes, by the folder or the control group that betrays them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_text().replace("\0", " ") + (folder / "cgroup").read_text()
        except OSError:
            continue  # it has just ended
        if SITE.name in text:
            found[int(folder.name)] = text.splitlines()[0][:100]
    return found


def daemons() -> set[int]:
    """Those that none of the others started: not what kubelet and containerd run in passing."""
    mine = processes()
    parents = {}
    for pid in mine:
        with contextlib.suppress(OSError):  # it has just ended
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return {pid for pid, parent in parents.items() if parent not in mine}


def namespaces(kind: str, pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        try:
            found.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
        except OSError:
            continue  # it has just ended
    return found


def all_pids() -> set[int]:
    return {int(folder.name) for folder in Path("/proc").glob("[0-9]*")}


def traces() -> dict[str, Any]:
    """Everything on this machine by which a cluster could be noticed, beside its processes and namespaces."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    folders = ("/run", "/var/lib", "/var/log", "/etc", "/opt", "/usr/libexec", "/usr/libexec/kubernetes")
    return {
        "mounts": {mount for mount in mounts if not mount.startswith("/run/user")},
        "links": set(shell.run(["ip", "-brief", "link"]).stdout.splitlines()),
        "routes": set(shell.run(["ip", "route"]).stdout.splitlines()),
        "rules": {line for line in shell.run(["iptables-save"]).stdout.splitlines() if not line.startswith(("#", ":"))},
        "named namespaces": set(shell.run(["ip", "netns", "list"]).stdout.splitlines()),
        "folders": {str(entry) for folder in map(Path, folders) if folder.is_dir() for entry in folder.iterdir()},
        "control groups": {folder for folder, _, _ in os.walk("/sys/fs/cgroup") if SITE.name in folder},
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in KUBELET_SYSCTLS},
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
    }


def run_a_pod(cluster: HostCluster) -> None:
    """Run something in a container, with a volume and a Service's rules around it."""
    pause = images.pause(binaries.folder()).image
    container = {
        "name": "pause",
        "image": pause.reference,
        "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
    }
    volume = {"name": "memory", "emptyDir": {"medium": "Memory"}}
    cluster.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pause", "labels": {"app": "pause"}},
            "spec": {"containers": [container], "volumes": [volume]},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "pause"},
            "spec": {"selector": {"app": "pause"}, "ports": [{"port": 80}]},
        },
        namespace="default",
    )
    cluster.kubectl("wait", "--for=condition=Ready", "pod/pause", "--timeout=60s")


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)


def assert_gone(before: dict[str, Any], namespaces_then: set[str]) -> None:
    def lingering() -> str | None:
        if left := processes():
            return f"processes {left}"
        if kept := namespaces_then & namespaces("net", all_pids()):
            return f"network namespaces {kept}"
        return None

    shell.wait_until(lingering, what="the end of the cluster", seconds=20)
    assert traces() == before
    assert not SITE.home.exists()


def test_up_after_every_process_was_killed_and_down_leaves_nothing(machine_cluster: HostCluster) -> None:
    before = traces()
    machine_cluster.up()
    run_a_pod(machine_cluster)
    mine, lasting = set(processes()), daemons()
    machine_cluster.up()
    assert daemons() >= lasting  # a healthy cluster is left alone
    net = namespaces("net", mine) - namespaces("net", {os.getpid()})
    assert len(net) == 2  # the node's and the pod's

    kill(mine)

    assert machine_cluster.status().health == "sick"
    machine_cluster.up()
    run_a_pod(machine_cluster)
    net |= namespaces("net", set(processes())) - namespaces("net", {os.getpid()})
    machine_cluster.down()
    assert machine_cluster.status().health == "absent"
    assert_gone(before, net)


def test_a_cluster_that_lost_daemons_is_called_sick_and_made_whole(machine_cluster: HostCluster) -> None:
    machine_cluster.up()

    def not_missed(victim: str) -> str | None:
        return None if victim in machine_cluster.status().detail else "still called healthy"

    for victim in ("coredns", "pause"):
        kill({pid for pid in processes() if Path(f"/proc/{pid}/comm").read_text().strip() == victim})
        shell.wait_until(partial(not_missed, victim), what=victim, seconds=5)

    machine_cluster.up()

    assert machine_cluster.status().health == "healthy"


@pytest.mark.parametrize("seconds", [0.3, 1.5, 4.0])
def test_a_start_that_was_cut_off_anywhere_is_cleaned_up(machine_cluster: HostCluster, seconds: float) -> None:
    before = traces()
    child = os.fork()
    if child == 0:
        try:
            machine_cluster.up()
        finally:
            os._exit(0)
    with pytest.raises(NotReady):  # the time passes in which it starts
        shell.wait_until(lambda: "starting", what="the start", seconds=seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    machine_cluster.down()

    assert_gone(before, set())


def test_a_daemon_that_ends_at_once_is_told_with_its_last_words(machine_cluster: HostCluster, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in binaries.folder().iterdir():
        (programs / program.name).symlink_to(program)
    (programs / "etcd").unlink()
    (programs / "etcd").write_text("#!/bin/sh\necho there is no disk >&2\nexit 1\n")
    (programs / "etcd").chmod(0o755)

    with pytest.raises(HarnessError, match=r"(?s)etcd.*there is no disk"):
        Start(HostNode(SITE), programs, images.pause(binaries.folder()).image).run()
