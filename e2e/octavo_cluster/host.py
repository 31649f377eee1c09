"""The cluster made of this machine: etcd, control plane, containerd and kubelet, without Docker. Linux, root."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from octavo_cluster import backend, binaries, buildah, images, locks, network, node, packages, paths, start, storage
from octavo_cluster.errors import PrerequisiteMissing
from octavo_cluster.host_node import HOLDER, HostNode
from octavo_cluster.kubectl import Kubectl
from octavo_cluster.progress import say, step
from octavo_cluster.site import MACHINE, Site

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from octavo_cluster.recipe import Image


class HostCluster:
    """The cluster of this machine; see octavo_cluster.backend.Cluster for its methods."""

    name = "host"
    node = node.NAME
    storage_class = storage.STORAGE_CLASS

    def __init__(self, site: Site = MACHINE, kubeconfig: Path | None = None) -> None:
        """Take hold of it, whether it is up or not.

        Args:
            site: names and addresses.
            kubeconfig: where clients find it; None is the path that all backends share.
        """
        self.kubeconfig = kubeconfig or paths.kubeconfig_path()
        self._site = site
        self._host = HostNode(site)

    @property
    def kubectl(self) -> Kubectl:
        """A kubectl for it, as administrator."""
        return Kubectl(binaries.folder() / "kubectl", self.kubeconfig)

    def up(self) -> None:
        """Bring it up; see Cluster.up."""
        _check_machine()
        packages.ensure()
        programs = binaries.ensure(binaries.WHOLE_CLUSTER)
        pause = images.pause(programs)
        buildah.ensure(pause)
        with self._changing():
            before = self.status()
            if before.health == "healthy":
                return
            if before.health == "sick":
                say(f"    the cluster is not whole ({before.detail}): making it anew")
                self._remove()
            with step("cluster: starting", expected="about 10 s"):
                start.Start(self._host, programs, pause.image).run()
            self._export()

    def down(self) -> None:
        """Take it down; see Cluster.down."""
        _check_machine()
        with self._changing():
            if self._host.exists():
                self._remove()

    def status(self) -> backend.Status:
        """Say what is there; see Cluster.status."""
        if not self._host.exists():
            return backend.Status("absent", "no cluster")
        stopped = [name for name in (HOLDER, *start.DAEMONS) if self._host.group.daemon(name) is None]
        if stopped:
            return backend.Status("sick", f"not running: {', '.join(stopped)}")
        if not network.is_connected(self._site):
            return backend.Status("sick", f"network interface {self._site.interface} is gone")
        if not start.finished_kubeconfig(self._host.home).exists():
            return backend.Status("sick", "it was not started to the end")
        self._export()
        if missing := start.node_not_ready(self.kubectl):
            return backend.Status("sick", missing)
        return backend.Status("healthy", f"node {self.node} is ready at {self._site.url}")

    def load_image(self, image: Image) -> None:
        """Put an image onto the node; see Cluster.load_image."""
        self._host.load(image)

    @contextlib.contextmanager
    def reach(self, namespace: str, service: str) -> Iterator[str]:
        """The Service's own address: there is a route to it; see Cluster.reach."""
        found = self.kubectl.get("service", service, f"--namespace={namespace}")
        yield f"http://{found['spec']['clusterIP']}"

    def _changing(self) -> AbstractContextManager[None]:
        return locks.exclusive(paths.cache_dir() / f"{self._site.name}.lock", "changing the cluster")

    def _export(self) -> None:
        backend.export_kubeconfig(self.kubeconfig, start.finished_kubeconfig(self._host.home).read_text())

    def _remove(self) -> None:
        with step("cluster: taking down", expected="about 10 s"):
            self._host.remove()
        backend.forget_kubeconfig(self.kubeconfig)


def _check_machine() -> None:
    if sys.platform != "linux":
        raise PrerequisiteMissing("a cluster needs Docker (for kind) or Linux: start Docker and try again")
    if os.geteuid() != 0:
        raise PrerequisiteMissing("a cluster needs Docker (for kind) or root: start Docker, or run this as root")
