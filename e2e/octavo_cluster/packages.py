"""Debian packages that the host's cluster needs; installed when something is missing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import node, paths, shell
from octavo_cluster.errors import CommandFailed, PrerequisiteMissing
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package and the program by which one sees that it is there."""

    name: str
    program: str


PACKAGES = (
    Package("containerd", "/usr/bin/containerd"),
    Package("runc", "/usr/sbin/runc"),
    Package("containernetworking-plugins", f"{node.CNI_PROGRAMS}/bridge"),
    Package("iptables", "/usr/sbin/iptables"),
    Package("iproute2", "/usr/sbin/ip"),
    Package("buildah", "/usr/bin/buildah"),
    Package("debootstrap", "/usr/sbin/debootstrap"),
    Package("docker-registry", "/usr/bin/docker-registry"),  # the engine's tests pull from it and push to it
    Package("prometheus", "/usr/bin/promtool"),  # tests the chart's alerts
)


def missing(exists: Callable[[str], bool] = lambda program: Path(program).exists()) -> list[str]:
    """The packages whose programs are not on this machine."""
    return [package.name for package in PACKAGES if not exists(package.program)]


def ensure() -> None:
    """Install what is missing.

    Raises:
        PrerequisiteMissing: not root, not Debian, or apt-get failed; the message says what to install.
    """
    names = missing()
    if not names:
        return
    wanted = f"missing: {', '.join(names)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PrerequisiteMissing(f"{wanted}. Install them (on Debian, as root: apt-get install {' '.join(names)})")
    log = paths.cache_dir() / "logs" / "apt-get.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with step(f"Debian packages: installing {', '.join(names)}", expected="about 1 min"):
        try:
            shell.run_logged(["apt-get", "update"], log, env=quiet)
            shell.run_logged(["apt-get", "install", "--yes", "--no-install-recommends", *names], log, env=quiet)
        except CommandFailed as error:
            raise PrerequisiteMissing(f"{wanted}, and apt-get could not install them:\n{error}") from error
    if still := missing():
        raise PrerequisiteMissing(
            f"apt-get installed {', '.join(still)}, but the programs are not where Debian has them"
        )
