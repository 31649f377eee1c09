"""The node's network: a namespace of its own, joined to the machine by one pair of virtual interfaces.

Bridge, firewall rules, kernel settings and pods' namespaces are all inside, and vanish with the last process in it. On
the machine there are one interface and two routes (to pods and to Services), which vanish with it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo_cluster import node, shell
from octavo_cluster.errors import CommandFailed, HarnessError, PrerequisiteMissing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_cluster.site import Site

UPLINK = "uplink"  # the node's end of the pair

# They are those of the namespace in which they are written.
FORWARDING = ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables")


def connect(site: Site, holder: int, inside: Sequence[str]) -> None:
    """Join the machine and the node.

    Args:
        site: names and addresses.
        holder: the process whose network namespace is the node's.
        inside: the start of a command line that runs the rest in that namespace.

    Raises:
        HarnessError: another network has the addresses.
        PrerequisiteMissing: the kernel cannot filter what crosses a bridge.
    """
    routes = [str(site.pods), str(site.services)]
    for network in routes:
        taken = shell.run(["ip", "-4", "route", "show", "exact", network]).stdout.strip()
        if taken:
            raise HarnessError(f"{network} is in use on this machine ({taken}): remove that route and try again")
    shell.run(["ip", "link", "add", site.interface, "type", "veth", "peer", "name", UPLINK, "netns", str(holder)])
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "link", "add", node.BRIDGE, "type", "bridge"],
        ["ip", "address", "add", f"{site.address}/{site.pods.prefixlen}", "dev", node.BRIDGE],
        ["ip", "link", "set", node.BRIDGE, "up"],
        ["ip", "address", "add", f"{site.node_address}/{site.uplink.prefixlen}", "dev", UPLINK],
        ["ip", "link", "set", UPLINK, "up"],
    ):
        shell.run([*inside, *command])
    machine_address = f"{site.machine_address}/{site.uplink.prefixlen}"
    shell.run(["ip", "address", "add", machine_address, "dev", site.interface])
    shell.run(["ip", "link", "set", site.interface, "up"])
    for network in routes:
        shell.run(["ip", "route", "add", network, "via", site.node_address, "dev", site.interface])
    try:
        for setting in FORWARDING:
            shell.run([*inside, "sh", "-c", f"echo 1 > /proc/sys/{setting}"])
    except CommandFailed as error:
        raise PrerequisiteMissing(f"bridges cannot be filtered: run `modprobe br_netfilter`\n{error}") from error


def is_connected(site: Site) -> bool:
    """Whether the machine's end of the pair exists."""
    return shell.run(["ip", "link", "show", site.interface], check=False).returncode == 0


def disconnect(site: Site) -> None:
    """Remove the machine's end now: with the namespace it goes too, but some time later."""
    if is_connected(site):
        shell.run(["ip", "link", "delete", site.interface], check=False)  # the kernel may be first
