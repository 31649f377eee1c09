"""Command lines and files of the control plane, shared by the whole cluster and by the API server alone. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from octavo_cluster.pki import Authority, Pair

# Only what needs no node: objects are collected and namespaces emptied as in a cluster, but nothing creates pods.
CONTROLLERS_WITHOUT_NODES = (
    "garbage-collector-controller",
    "namespace-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "clusterrole-aggregation-controller",
)

# One JSON line for each write that is answered; reads would drown them.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]}],
}


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the control plane presents and trusts."""

    authority: Path
    api_server: Pair  # serves the API, and is the API server's client certificate to the kubelet
    service_account_key: Path

    @classmethod
    def issue(cls, authority: Authority, hosts: Sequence[str]) -> Certificates:
        """Issue them for an API server that answers on `hosts` besides its names inside the cluster."""
        inside = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        return cls(
            authority=authority.certificate,
            api_server=authority.issue(
                "kube-apiserver", user="kube-apiserver", group="system:masters", hosts=[*inside, *hosts]
            ),
            service_account_key=authority.service_account_key(),
        )


def write_audit_policy(folder: Path) -> Path:
    """Write the audit policy into `folder`."""
    path = folder / "audit-policy.yaml"
    path.write_text(json.dumps(AUDIT_POLICY))
    return path


def etcd(program: Path, *, data: Path, client_port: int, peer_port: int) -> list[str | Path]:
    """An etcd of one member that forgets everything on a power failure, which is all right here."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        program,
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        "--log-level=warn",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]


def kube_apiserver(
    program: Path,
    certificates: Certificates,
    *,
    bind: str,
    advertise: str,
    port: int,
    services: str,
    etcd_port: int,
    audit_policy: Path,
    audit_log: Path,
) -> list[str | Path]:
    """An API server with RBAC, node authorisation and a log of every write."""
    serving = certificates.api_server
    return [
        program,
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--bind-address={bind}",
        f"--advertise-address={advertise}",
        f"--secure-port={port}",
        f"--service-cluster-ip-range={services}",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged",
        f"--client-ca-file={certificates.authority}",
        f"--tls-cert-file={serving.certificate}",
        f"--tls-private-key-file={serving.key}",
        f"--kubelet-client-certificate={serving.certificate}",
        f"--kubelet-client-key={serving.key}",
        f"--kubelet-certificate-authority={certificates.authority}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates.service_account_key}",
        f"--service-account-signing-key-file={certificates.service_account_key}",
        f"--audit-policy-file={audit_policy}",
        f"--audit-log-path={audit_log}",
        "--audit-log-mode=blocking",
    ]


def kube_controller_manager(
    program: Path, certificates: Certificates, *, kubeconfig: Path, controllers: Sequence[str], plugins: Path
) -> list[str | Path]:
    """A controller manager that looks often, so that tests need not wait."""
    return [
        program,
        f"--kubeconfig={kubeconfig}",
        f"--controllers={','.join(controllers)}",
        "--leader-elect=false",
        "--use-service-account-credentials",
        f"--root-ca-file={certificates.authority}",
        f"--service-account-private-key-file={certificates.service_account_key}",
        "--horizontal-pod-autoscaler-sync-period=2s",
        f"--flex-volume-plugin-dir={plugins}",  # its default is a folder that it would make in /usr
        "--secure-port=0",
    ]


def kube_scheduler(program: Path, *, kubeconfig: Path) -> list[str | Path]:
    """The only scheduler, so that it need not be elected."""
    return [program, f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0"]
