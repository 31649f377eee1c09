"""One control group that holds every process of the host's cluster: how the harness knows what is its own.

A process joins the group before it becomes a daemon, and its children are born in it; the kubelet's containers live in
groups below it. So the kernel keeps the record of what `down` must end, exact at any moment, also after a crash. Works
on cgroup v1 (one tree for each controller; processes are followed in `pids`) and on v2.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster.errors import HarnessError, PrerequisiteMissing

if TYPE_CHECKING:
    from collections.abc import Iterator

KILL_SECONDS = 60.0
# Ten times the default, on v1 and on v2: to the scheduler all containers together are one among the machine's
# processes, and an engine whose threads wait for each other all but stands still beside a few busy ones.
CPU_WEIGHT = {"cpu.shares": "10240", "cpu.weight": "1000"}
# What the kubelet asks of cgroup v2.
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """The mounted trees of control groups."""

    all: tuple[Path, ...]  # where the kubelet makes groups
    processes: Path  # the one in which processes are followed
    unified: bool  # cgroup v2 alone


def hierarchies(mountinfo: str) -> Hierarchies:
    """Read them from the text of /proc/self/mountinfo.

    Raises:
        PrerequisiteMissing: no tree in which processes can be followed is mounted.
    """
    version_1: dict[str, Path] = {}
    version_2: list[Path] = []
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        point = Path(mount.split(" ")[4])
        if kind == "cgroup":
            version_1[options] = point
        elif kind == "cgroup2":
            version_2.append(point)
    followed = [point for options, point in version_1.items() if "pids" in options.split(",")]
    if followed:
        return Hierarchies(all=(*version_1.values(), *version_2), processes=followed[0], unified=False)
    if version_2 and not version_1:
        return Hierarchies(all=(version_2[0],), processes=version_2[0], unified=True)
    raise PrerequisiteMissing("no control groups are mounted at /sys/fs/cgroup: containers cannot run on this machine")


class ControlGroup:
    """The group `name` in every tree, with `name/node` for daemons; containers are the kubelet's affair."""

    def __init__(self, name: str) -> None:
        trees = hierarchies(Path("/proc/self/mountinfo").read_text())
        self._unified = trees.unified
        self._roots = [tree / name for tree in trees.all]
        self._root = trees.processes / name
        self.daemons = self._root / "node"

    def create(self) -> None:
        """Make the group, empty."""
        for root in self._roots:
            root.mkdir(exist_ok=True)
        if self._unified:  # the kubelet wants its controllers in the group that it is given
            above = self._root.parent
            offered = (above / "cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{name}" for name in CONTROLLERS if name in offered)
            for group in (above, self._root):
                (group / "cgroup.subtree_control").write_text(wanted)
        for root in self._roots:
            for name, value in CPU_WEIGHT.items():
                if (root / name).exists():
                    (root / name).write_text(value)
        self.daemons.mkdir(exist_ok=True)

    def joining(self) -> list[str]:
        """The start of a command line that runs the rest of it inside the group."""
        return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.daemons / "cgroup.procs")]

    def pids(self) -> set[int]:
        """Every process in the group and below it."""
        return set(_pids(self._root))

    def daemon(self, name: str) -> int | None:
        """The pid of the daemon whose program is `name`; None when it does not run."""
        for pid in sorted(_pids(self.daemons)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name[:15]:  # the kernel keeps 15 characters
                    return pid
        return None

    def kill(self) -> None:
        """End every process in the group, and nothing else.

        Raises:
            HarnessError: some cannot be killed, such as one that waits for a dead disk.
        """
        deadline = time.monotonic() + KILL_SECONDS
        while pids := self.pids():
            for pid in pids:
                self._kill(pid)
            if time.monotonic() > deadline:
                raise HarnessError(f"these processes of the cluster do not end: {sorted(pids)}")
            time.sleep(0.05)

    def _kill(self, pid: int) -> None:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            # The handle pins the process: if it is in the group now, the signal cannot reach another one.
            if pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)

    def exists(self) -> bool:
        """Whether anything of the group is there."""
        return any(root.exists() for root in self._roots)

    def remove(self) -> None:
        """Remove the group, which must be empty, with all that containers left below it."""
        for root in self._roots:
            for group in sorted(_groups(root), reverse=True):
                _remove_group(group)


def _groups(root: Path) -> Iterator[Path]:
    for folder, _, _ in os.walk(root):
        yield Path(folder)


def _pids(root: Path) -> Iterator[int]:
    for group in _groups(root):
        # A container's group may go while it is read.
        with contextlib.suppress(FileNotFoundError, OSError):
            yield from (int(line) for line in (group / "cgroup.procs").read_text().split())


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while group.exists():
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:  # busy until the kernel has buried the last process
            if time.monotonic() > deadline:
                raise HarnessError(f"{group}: {error}") from error
            time.sleep(0.05)
