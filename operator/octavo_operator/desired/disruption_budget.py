"""The PodDisruptionBudget: node drains take one pod at a time. Called by desired.children; pure."""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService) -> Manifest:
    """The manifest of the PodDisruptionBudget.

    A pod that is not ready may always be evicted: otherwise a service that cannot start would keep its nodes from
    being drained. A single pod may be, too: a drain that can never end is worse than an announced interruption.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": object_meta(service, names.disruption_budget(service.name)),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector(service.name)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
