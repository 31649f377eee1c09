"""One start of a host cluster, from nothing to a ready node, in order. Called by host.py only."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from octavo_cluster import control_plane, node, storage
from octavo_cluster.kubectl import Kubectl
from octavo_cluster.pki import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_cluster.host_node import HostNode
    from octavo_cluster.recipe import Image

DAEMONS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "kubelet",
    "kube-proxy",
    "coredns",
)
ETCD_PORT, ETCD_PEER_PORT = 2379, 2380  # in the node's own network namespace


def finished_kubeconfig(home: Path) -> Path:
    """The administrator's kubeconfig: it appears when a start has gone to its end, and is the sign of that."""
    return home / "admin.kubeconfig"


def node_not_ready(kubectl: Kubectl) -> str | None:
    """Why the node is not ready; None when it is."""
    ready = '.status.conditions[?(@.type=="Ready")]'
    asked = f"--output=jsonpath={{{ready}.status}} {{{ready}.message}}"
    seen = kubectl("get", "node", node.NAME, asked, "--request-timeout=5s", check=False)
    if seen.returncode != 0:
        return seen.stderr.strip()
    return None if seen.stdout.startswith("True") else f"node {node.NAME}: {seen.stdout or 'no condition Ready'}"


class Start:
    """A start of the cluster on a node of which nothing is there yet."""

    def __init__(self, host: HostNode, programs: Path, pause: Image) -> None:
        self._host = host
        self._programs = programs
        self._pause = pause
        self._kubectl = Kubectl(programs / "kubectl", host.home / "starting.kubeconfig")

    def run(self) -> None:
        """Start everything.

        Raises:
            CommandFailed: a daemon ended; the message holds the last lines of its log.
            NotReady: something did not become ready in time.
        """
        self._host.create(self._programs / "pause")
        self._issue_certificates()
        self._start_control_plane()
        self._start_node()
        volumes = self._host.home / "volumes"
        storage.make_folders(volumes)
        self._kubectl.apply(*storage.manifests(volumes))
        self._kubectl.kubeconfig.rename(finished_kubeconfig(self._host.home))

    def _issue_certificates(self) -> None:
        site = self._host.site
        authority = Authority(self._host.home / "pki")
        self._issued = control_plane.Certificates.issue(authority, ["localhost", site.kubernetes_service, site.address])
        self._kubelet_serving = authority.issue("kubelet", user=node.NAME, hosts=[node.NAME, site.address])
        for path, user, group in (
            (self._kubectl.kubeconfig, "admin", "system:masters"),
            (self._client("kube-controller-manager"), "system:kube-controller-manager", None),
            (self._client("kube-scheduler"), "system:kube-scheduler", None),
            (self._client("kubelet"), f"system:node:{node.NAME}", "system:nodes"),
            (self._client("kube-proxy"), "system:kube-proxy", "system:node-proxier"),
            (self._client("coredns"), "coredns", "system:masters"),  # no built-in role suits it
        ):
            authority.kubeconfig(path, site.url, authority.issue(f"{path.stem}-client", user=user, group=group))

    def _start_control_plane(self) -> None:
        home, site = self._host.home, self._host.site
        etcd = control_plane.etcd(
            self._programs / "etcd", data=home / "etcd", client_port=ETCD_PORT, peer_port=ETCD_PEER_PORT
        )
        self._host.start("etcd", etcd)
        api_server = control_plane.kube_apiserver(
            self._programs / "kube-apiserver",
            self._issued,
            bind="0.0.0.0",  # noqa: S104 - every address of the node's own namespace
            advertise=site.address,
            port=6443,
            services=str(site.services),
            etcd_port=ETCD_PORT,
            audit_policy=control_plane.write_audit_policy(home / "etc"),
            audit_log=home / "audit.log",
        )
        self._host.start("kube-apiserver", api_server)
        self._start_containerd()  # uses the time that the API server takes
        self._host.wait("kube-apiserver", self._api_server_not_ready)
        controller_manager = control_plane.kube_controller_manager(
            self._programs / "kube-controller-manager",
            self._issued,
            kubeconfig=self._client("kube-controller-manager"),
            controllers=["*"],
            plugins=home / "plugins",
        )
        self._host.start("kube-controller-manager", controller_manager)
        scheduler = control_plane.kube_scheduler(
            self._programs / "kube-scheduler", kubeconfig=self._client("kube-scheduler")
        )
        self._host.start("kube-scheduler", scheduler)

    def _start_containerd(self) -> None:
        home = self._host.home
        self._host.write("cni/octavo.conflist", node.cni_config(self._host.site))
        text = node.containerd_config(
            root=home / "lib" / "containerd", cni=home / "etc" / "cni", sandbox_image=self._pause.reference
        )
        self._host.start("containerd", ["containerd", f"--config={self._host.write('containerd.toml', text)}"])

    def _start_node(self) -> None:
        home, site = self._host.home, self._host.site
        self._host.wait("containerd", self._host.containerd_not_answering)
        self._host.load(self._pause)
        self._host.write_down_sysctls()
        config = self._host.write(
            "kubelet.yaml",
            node.kubelet_config(
                site,
                authority=self._issued.authority,
                serving=self._kubelet_serving,
                plugins=home / "plugins",
            ),
        )
        kubelet = node.kubelet(
            site,
            program=self._programs / "kubelet",
            config=config,
            kubeconfig=self._client("kubelet"),
            root=home / "lib" / "kubelet",
        )
        self._host.start("kubelet", kubelet)
        proxy = self._host.write("kube-proxy.yaml", node.kube_proxy_config(site, kubeconfig=self._client("kube-proxy")))
        self._host.start("kube-proxy", [self._programs / "kube-proxy", f"--config={proxy}"])
        corefile = self._host.write("Corefile", node.corefile(site, kubeconfig=self._client("coredns")))
        self._host.start("coredns", [self._programs / "coredns", "-conf", corefile])
        self._host.wait("kubelet", lambda: node_not_ready(self._kubectl))
        # Nothing can be created in a namespace whose default service account is missing.
        self._host.wait("kube-controller-manager", self._no_service_account)

    def _client(self, name: str) -> Path:
        return self._host.home / "pki" / f"{name}.kubeconfig"

    def _no_service_account(self) -> str | None:
        seen = self._kubectl("get", "serviceaccount", "default", "--namespace=default", check=False)
        return None if seen.returncode == 0 else seen.stderr.strip()

    def _api_server_not_ready(self) -> str | None:
        # Not kubectl: it needs a second on a busy machine, and there is nothing yet that could be asked for.
        trusting = ssl.create_default_context(cafile=str(self._issued.authority))
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting)]
        try:
            with urllib.request.build_opener(*handlers).open(f"{self._host.site.url}/readyz", timeout=5):
                return None
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode(errors="replace")
        except OSError as error:
            return str(error)
