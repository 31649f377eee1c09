"""The NetworkPolicy: who may reach the pods, and on which port. Called by desired.children; pure.

Only traffic to the pods is limited; they may reach whatever the cluster lets them. It takes a network plugin that
enforces NetworkPolicies; probes of the kubelet pass in every one of them.
"""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService) -> Manifest:
    """The manifest of the NetworkPolicy: the port `http`, for the pods of all namespaces or for whom the spec names."""
    allowed = service.spec.endpoint.allow_from
    peers = [{"namespaceSelector": {}}] if allowed is None else [peer.to_dict() for peer in allowed]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": object_meta(service, names.network_policy(service.name)),
        "spec": {
            "podSelector": {"matchLabels": names.selector(service.name)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": peers, "ports": [{"port": names.HTTP_PORT_NAME, "protocol": "TCP"}]}],
        },
    }
