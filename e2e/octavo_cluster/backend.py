"""The one interface of a cluster, and the choice of who makes it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from octavo_cluster import shell
from octavo_cluster.errors import CommandFailed
from octavo_cluster.kubectl import KUBECTL_CACHE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from octavo_cluster.kubectl import Kubectl
    from octavo_cluster.recipe import Image

DOCKER_SECONDS = 20.0
Health = Literal["absent", "healthy", "sick"]


@dataclass(frozen=True, slots=True)
class Status:
    """What is there of the cluster."""

    health: Health
    detail: str  # what is wrong, or where it is


class Cluster(Protocol):
    """A cluster of one node. Every method may be called at any time, also after a crash."""

    name: str  # "host" or "kind"

    def up(self) -> None:
        """Bring it up and wait until it is ready; a healthy one is left alone, a sick one is made anew."""

    def down(self) -> None:
        """Take it down, whatever is left of it."""

    def status(self) -> Status:
        """Say what is there; takes about a second."""

    def load_image(self, image: Image) -> None:
        """Put a built image onto the node, unless it is there."""

    def reach(self, namespace: str, service: str) -> AbstractContextManager[str]:
        """The base URL under which this machine reaches port 80 of a Service, as long as the context lives."""

    @property
    def kubectl(self) -> Kubectl:
        """A kubectl for it, as administrator."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig; the same path for every kind of cluster."""

    @property
    def node(self) -> str:
        """The name of its only node."""

    @property
    def storage_class(self) -> str:
        """The storage class of claims."""


def docker_answers() -> bool:
    """Whether there is a Docker daemon that this user may use, and it answers soon."""
    try:
        shell.run(["docker", "info"], timeout=DOCKER_SECONDS)
    except CommandFailed:
        return False
    return True


def choose() -> Cluster:
    """The backend for this machine: kind where Docker answers, else the machine itself."""
    # Imported here: each backend imports this module for its types.
    from octavo_cluster.host import HostCluster  # noqa: PLC0415 - see above
    from octavo_cluster.kind import KindCluster  # noqa: PLC0415 - see above

    return KindCluster() if docker_answers() else HostCluster()


def export_kubeconfig(path: Path, text: str) -> None:
    """Write the administrator's kubeconfig where clients find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def forget_kubeconfig(path: Path) -> None:
    """Remove it and kubectl's cache beside it, and their folder when nothing else is in it."""
    path.unlink(missing_ok=True)
    shutil.rmtree(path.parent / KUBECTL_CACHE, ignore_errors=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
