"""The node of a host cluster as a thing on this machine: its namespaces, its processes, its folder, and their end.

What makes it leave nothing behind, however it ends, is the kernel:

- every process is in one control group (cgroup.py), so that `remove` knows exactly what to end;
- all of them share a mount and a network namespace, so that mounts, bridges, firewall rules and pods' namespaces vanish
  with the last process. In it `/run` is empty memory, and `/var/lib` and `/var/log` are folders of the site's home;
- what remains is one folder, the control group, and a few kernel settings, which are written down before they change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import network, shell
from octavo_cluster.cgroup import ControlGroup
from octavo_cluster.errors import CommandFailed, HarnessError, NotReady
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_cluster.recipe import Image
    from octavo_cluster.site import Site

# Kernel settings of the whole machine that the kubelet changes; its network settings stay in the node's namespace.
KUBELET_SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
HOLDER = "pause"  # a program that does nothing until it is ended: it keeps the node's namespaces open
READY_SECONDS = 90.0
_CTR = ("ctr", "--address=/run/containerd/containerd.sock", "--namespace=k8s.io")

# Run by the process that holds the namespaces. The home ($1) keeps its path inside the new /var/lib.
_ENTER = """
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$1" "$1/lib/$(basename "$1")"
mount --rbind "$1/lib" /var/lib
mount --bind "$1/log" /var/log
exec "$0"
"""


class HostNode:
    """The node of one site. Makes no decisions: host.py says when, start.py in which order."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.home = site.home
        self.group = ControlGroup(site.name)
        self._started: list[str] = []  # daemons that must live

    def exists(self) -> bool:
        """Whether anything of it is there."""
        return self.home.exists() or self.group.exists() or network.is_connected(self.site)

    def create(self, holder: Path) -> None:
        """Make its folders, control group, namespaces and network; nothing of it may be there.

        Args:
            holder: the program HOLDER.
        """
        for folder in (
            "etc/cni",
            "log",
            "daemons",
            "plugins",
            "lib/kubelet",
            "lib/containerd",
            f"lib/{self.home.name}",
        ):
            (self.home / folder).mkdir(parents=True)
        self._started.clear()
        self.group.create()
        unshare = ["unshare", "--mount", "--net", "--propagation=slave"]
        self._spawn(HOLDER, [*unshare, "sh", "-euc", _ENTER, holder, self.home])
        self._wait_for_program(HOLDER)
        network.connect(self.site, self._holder(), self.inside())

    def inside(self) -> list[str]:
        """The start of a command line that runs the rest in the node's namespaces.

        Raises:
            HarnessError: the node does not run.
        """
        return ["nsenter", f"--target={self._holder()}", "--mount", "--net", "--"]

    def start(self, daemon: str, command: Sequence[str | Path]) -> None:
        """Start a daemon, which outlives this process.

        Args:
            daemon: its program's name.
            command: its command line.

        Raises:
            NotReady: it did not come to run.
        """
        self._spawn(daemon, [*self.inside(), *command])
        self._wait_for_program(daemon)
        self._started.append(daemon)

    def wait(self, daemon: str, missing: shell.Missing) -> None:
        """Wait until nothing is missing of what the daemon provides, but not longer than every daemon lives.

        Raises:
            CommandFailed: a daemon ended; the message holds its last lines.
            NotReady: it took too long; the message holds the daemon's last lines.
        """

        def seen() -> str | None:
            for name in self._started:
                if self.group.daemon(name) is None:
                    raise CommandFailed(f"{name} ended; {self._log(name)}")
            return missing()

        try:
            shell.wait_until(seen, what=daemon, seconds=READY_SECONDS)
        except NotReady as error:
            raise NotReady(f"{error}\n{self._log(daemon)}") from error

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder of configurations."""
        path = self.home / "etc" / name
        path.write_text(text)
        return path

    def write_down_sysctls(self) -> None:
        """Remember the kernel settings that the kubelet is about to change."""
        values = {name: Path("/proc/sys", name).read_text().strip() for name in KUBELET_SYSCTLS}
        partial = self.home / "sysctls.partial"
        partial.write_text(json.dumps(values))
        partial.rename(self.home / "sysctls.json")

    def containerd_not_answering(self) -> str | None:
        """What containerd says to the question for its version; None when it answers."""
        seen = shell.run([*self.inside(), *_CTR, "version"], check=False)
        return None if seen.returncode == 0 else seen.stderr.strip()

    def load(self, image: Image) -> None:
        """Import an image's archive into containerd, unless it is there."""
        if image.reference in self._images():
            return
        with step(f"{image.reference}: loading onto the node"):
            shell.run([*self.inside(), *_CTR, "images", "import", image.archive])
        if image.reference not in (there := self._images()):
            raise HarnessError(f"{image.archive} does not hold {image.reference}; the node has {', '.join(there)}")

    def remove(self) -> None:
        """End its processes and remove all that is left of it."""
        self.group.kill()
        network.disconnect(self.site)
        self.group.remove()
        record = self.home / "sysctls.json"
        if record.exists():
            for name, value in json.loads(record.read_text()).items():
                Path("/proc/sys", name).write_text(value)
        if self.home.exists():
            shutil.rmtree(self.home)

    def _images(self) -> list[str]:
        return shell.run([*self.inside(), *_CTR, "images", "list", "--quiet"]).stdout.split()

    def _holder(self) -> int:
        holder = self.group.daemon(HOLDER)
        if holder is None:
            raise HarnessError("the cluster is not up: run `make demo`, or `python -m octavo_cluster up`")
        return holder

    def _spawn(self, name: str, command: Sequence[str | Path]) -> None:
        # It joins the group first and only then leaves this process, so that there is no moment in which it is lost.
        with (self.home / "daemons" / f"{name}.log").open("ab") as output:
            shell.detach([*self.group.joining(), "setsid", "--fork", *command], output)

    def _wait_for_program(self, name: str) -> None:
        """Wait until what was spawned has become the program itself."""
        shell.wait_until(lambda: None if self.group.daemon(name) else self._log(name), what=name, seconds=5)

    def _log(self, daemon: str) -> str:
        log = self.home / "daemons" / f"{daemon}.log"
        return f"{log} ends with\n{shell.tail(log.read_text(errors='replace'))}"
