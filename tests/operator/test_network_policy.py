"""Whom the NetworkPolicy lets through, judged by evaluating it: no test cluster enforces one.

`lets` reads a policy as the API's reference says: https://kubernetes.io/docs/concepts/services-networking/network-policies/
"""

import ipaddress
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import network_policy

Json = dict[str, Any]
HOME: Final = {"kubernetes.io/metadata.name": "team-a"}
AWAY: Final = {"kubernetes.io/metadata.name": "team-b"}


@dataclass(frozen=True)
class Caller:
    """Who opens a connection."""

    pod: dict[str, str] | None = field(default_factory=dict)  # labels; None: no pod
    namespace: dict[str, str] = field(default_factory=lambda: HOME)  # labels of the pod's namespace
    address: str = "10.0.0.1"


def policy(**endpoint: Any) -> Json:
    service = InferenceService.model_validate(
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "llama", "namespace": "team-a", "uid": "1234"},
            "spec": {"model": {"source": "pvc://models/llama.gguf"}, "endpoint": endpoint},
        }
    )
    spec: Json = network_policy.build(service)["spec"]
    return spec


def selects(selector: Json, labels: dict[str, str]) -> bool:
    def holds(it: Json) -> bool:
        value = labels.get(it["key"])
        return {
            "In": value in it.get("values", ()),
            "NotIn": value not in it.get("values", ()),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[it["operator"]]

    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        holds(each) for each in selector.get("matchExpressions", ())
    )


def is_peer(peer: Json, caller: Caller) -> bool:
    if "ipBlock" in peer:
        return ipaddress.ip_address(caller.address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if caller.pod is None:
        return False
    in_namespace = (
        selects(peer["namespaceSelector"], caller.namespace)
        if "namespaceSelector" in peer
        else caller.namespace == HOME
    )
    return in_namespace and selects(peer.get("podSelector", {}), caller.pod)


def lets(spec: Json, caller: Caller, port: str = "http") -> bool:
    return any(
        (not rule.get("from") or any(is_peer(peer, caller) for peer in rule["from"]))
        and (not rule.get("ports") or any(each["port"] == port for each in rule["ports"]))
        for rule in spec["ingress"]
    )


def test_by_default_pods_of_all_namespaces_reach_the_port_and_no_other() -> None:
    spec = policy()
    assert lets(spec, Caller())
    assert lets(spec, Caller(namespace=AWAY))
    assert not lets(spec, Caller(), port="debug")
    assert not lets(spec, Caller(pod=None))


def test_only_what_comes_in_is_limited() -> None:
    assert policy()["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize(
    ("peer", "allowed", "denied"),
    [
        ({"podSelector": {"matchLabels": {"app": "chat"}}}, Caller({"app": "chat"}), Caller({"app": "other"})),
        ({"podSelector": {}}, Caller(), Caller(namespace=AWAY)),
        ({"namespaceSelector": {"matchLabels": AWAY}}, Caller(namespace=AWAY), Caller()),
        ({"podSelector": {}, "namespaceSelector": {}}, Caller(namespace=AWAY), Caller(pod=None)),
        ({"ipBlock": {"cidr": "192.168.0.0/16"}}, Caller(None, address="192.168.7.7"), Caller(None)),
        ({"ipBlock": {"cidr": "2001:db8::/32"}}, Caller(None, address="2001:db8::1"), Caller(None)),
        (
            {"podSelector": {"matchExpressions": [{"key": "tier", "operator": "In", "values": ["a", "b"]}]}},
            Caller({"tier": "b"}),
            Caller({"tier": "c"}),
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "tier", "operator": "Exists"}]}},
            Caller({"tier": "c"}),
            Caller(),
        ),
    ],
)
def test_allow_from_narrows_it_to_whom_it_names(peer: Json, allowed: Caller, denied: Caller) -> None:
    spec = policy(allowFrom=[peer])
    assert lets(spec, allowed)
    assert not lets(spec, denied)
    assert not lets(spec, allowed, port="debug")
    both = policy(allowFrom=[{"podSelector": {"matchLabels": {"no": "body"}}}, peer])
    assert (lets(both, allowed), lets(both, denied)) == (True, False)
