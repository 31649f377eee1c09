"""A Kubernetes API server without nodes, in about four seconds: for tests that need its rules but no containers.

etcd, kube-apiserver and the few controllers that need no node (garbage collection, namespaces, service accounts). It
needs no root, listens on loopback only, and leaves nothing behind. Nothing in it makes pods: a test that needs a
Deployment's status writes it.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from octavo_cluster import binaries, control_plane, shell
from octavo_cluster.kubectl import Kubectl
from octavo_cluster.pki import Authority
from octavo_cluster.processes import Child

if TYPE_CHECKING:
    from types import TracebackType

READY_SECONDS = 60.0
SERVICE_RANGE = "10.96.0.0/16"  # nothing answers there


class ApiServer:
    """An API server that lives as long as its `with` block.

    Attributes:
        url: where it answers.
        kubeconfig: the administrator's.
        kubectl: a kubectl for it; see octavo_cluster.kubectl.Kubectl.
        audit_log: one line of JSON for each write that was answered (audit.k8s.io/v1 Event, level Metadata).
    """

    def __init__(self) -> None:
        programs = binaries.ensure_for_api_server()
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-api-server-"))
        self._children: list[Child] = []
        self.audit_log = self._folder / "audit.log"
        self.audit_log.touch()
        port, etcd_port, peer_port = _free_ports(3)
        self.url = f"https://127.0.0.1:{port}"
        self._authority = Authority(self._folder / "pki")
        certificates = control_plane.Certificates.issue(self._authority, ["localhost", "127.0.0.1"])
        self.kubeconfig = self.kubeconfig_for("admin", group="system:masters")
        self.kubectl = Kubectl(programs["kubectl"], self.kubeconfig)
        self._commands = {
            "etcd": control_plane.etcd(
                programs["etcd"], data=self._folder / "etcd", client_port=etcd_port, peer_port=peer_port
            ),
            "kube-apiserver": control_plane.kube_apiserver(
                programs["kube-apiserver"],
                certificates,
                bind="127.0.0.1",
                advertise="127.0.0.1",
                port=port,
                services=SERVICE_RANGE,
                etcd_port=etcd_port,
                audit_policy=control_plane.write_audit_policy(self._folder),
                audit_log=self.audit_log,
            ),
            "kube-controller-manager": control_plane.kube_controller_manager(
                programs["kube-controller-manager"],
                certificates,
                kubeconfig=self.kubeconfig_for("system:kube-controller-manager"),
                controllers=control_plane.CONTROLLERS_WITHOUT_NODES,
                plugins=self._folder,
            ),
        }

    def kubeconfig_for(self, user: str, group: str | None = None) -> Path:
        """A kubeconfig of any user; what the user may do is RBAC's to say."""
        name = user.replace(":", "-")
        client = self._authority.issue(name, user=user, group=group)
        return self._authority.kubeconfig(self._folder / f"{name}.kubeconfig", self.url, client)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        for name, command in self._commands.items():
            self._children.append(Child(name, command, self._folder / f"{name}.log"))
            if name == "kube-apiserver":
                shell.wait_until(self._not_ready, what="kube-apiserver", seconds=READY_SECONDS)
        # Nothing can be created in a namespace whose default service account is missing.
        shell.wait_until(self._no_service_account, what="kube-controller-manager", seconds=READY_SECONDS)

    def _not_ready(self) -> str | None:
        return self._missing("get", "--raw=/readyz")

    def _no_service_account(self) -> str | None:
        return self._missing("get", "serviceaccount", "default", "--namespace=default")

    def _missing(self, *arguments: str) -> str | None:
        for child in self._children:
            child.check_alive()
        seen = self.kubectl(*arguments, check=False, timeout=READY_SECONDS)
        return None if seen.returncode == 0 else seen.stderr.strip()

    def _stop(self) -> None:
        for child in reversed(self._children):
            child.stop()
        shutil.rmtree(self._folder)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
