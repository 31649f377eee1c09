"""The node's daemons: their configuration files and the kubelet's command line. Pure.

Every path is one in the node's own view of the file system; host_node.py says what that is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_cluster.pki import Pair
    from octavo_cluster.site import Site

NAME = "octavo"
BRIDGE = "cni0"
CLUSTER_DOMAIN = "cluster.local"
CNI_PROGRAMS = "/usr/lib/cni"  # where Debian has them


def containerd_config(*, root: Path, cni: Path, sandbox_image: str) -> str:
    """Containerd 1.6's configuration, version 2."""
    return f"""\
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{sandbox_image}"
enable_unprivileged_ports = true
# A machine without CAP_SYS_RESOURCE cannot lower a score: every pod would fail.
restrict_oom_score_adj = true
# A profile would be loaded into the kernel of the machine and stay there.
disable_apparmor = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PROGRAMS}"
conf_dir = "{cni}"
"""


def cni_config(site: Site) -> str:
    """Pods sit on a bridge of the node's and reach what the node reaches."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": str(site.pods)}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    return json.dumps({"cniVersion": "0.4.0", "name": "octavo", "plugins": [bridge]})


def kubelet_config(site: Site, *, authority: Path, serving: Pair, plugins: Path) -> str:
    """The kubelet's configuration: restricted to who may call it, and slow to evict."""
    document: dict[str, Any] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": site.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(serving.certificate),
        "tlsPrivateKeyFile": str(serving.key),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{site.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [site.address],
        "resolvConf": "",
        "volumePluginDir": str(plugins),
        "evictionHard": {"memory.available": "64Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # loaded images cannot be pulled again
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "10s",  # a minute by default; so often it looks whether a mounted ConfigMap has changed
        "maxPods": 64,
    }
    return json.dumps(document)


def kube_proxy_config(site: Site, *, kubeconfig: Path) -> str:
    """kube-proxy with iptables; connection-tracking limits are the machine's and stay as they are."""
    document: dict[str, Any] = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "hostnameOverride": NAME,
        "mode": "iptables",
        "clusterCIDR": str(site.pods),
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
    }
    return json.dumps(document)


def corefile(site: Site, *, kubeconfig: Path) -> str:
    """CoreDNS answers for the cluster's names and for nothing else: pods have no way out."""
    return f"""\
{CLUSTER_DOMAIN}:53 in-addr.arpa:53 {{
    bind {site.address}
    errors
    cache 5
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig} octavo
    }}
}}
"""


def kubelet(site: Site, *, program: Path, config: Path, kubeconfig: Path, root: Path) -> list[str | Path]:
    """The kubelet's command line."""
    return [
        program,
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={NAME}",
        f"--node-ip={site.address}",
        f"--root-dir={root}",
        "--v=1",
    ]
