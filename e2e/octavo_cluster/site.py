"""Where on this machine a host cluster is: its names and addresses. Two sites can be up side by side. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Site:
    """The names and addresses of one host cluster."""

    name: str  # of its folder and of its control group
    interface: str  # the machine's end of the connection
    pods: IPv4Network
    services: IPv4Network
    uplink: IPv4Network  # between the machine and the node

    @property
    def home(self) -> Path:
        """The folder of everything that it writes."""
        return Path("/var/lib") / self.name

    @property
    def address(self) -> str:
        """The node's: the API server, the kubelet and the cluster's DNS answer here."""
        return str(self.pods[1])

    @property
    def kubernetes_service(self) -> str:
        """The API server's own Service."""
        return str(self.services[1])

    @property
    def machine_address(self) -> str:
        """The machine's, on the way to the node."""
        return str(self.uplink[1])

    @property
    def node_address(self) -> str:
        """The node's, on the way to the machine."""
        return str(self.uplink[2])

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.address}:6443"


MACHINE = Site(
    name="octavo-cluster",
    interface="octavo0",
    pods=IPv4Network("10.88.0.0/24"),
    services=IPv4Network("10.96.0.0/16"),
    uplink=IPv4Network("10.88.255.0/30"),
)
