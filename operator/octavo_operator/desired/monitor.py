"""The PodMonitor, where Prometheus' operator is installed. Called by desired.children; pure."""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService) -> Manifest:
    """The manifest of the PodMonitor: /metrics of every pod, with the service's name as a label of each sample."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": object_meta(service, names.monitor(service.name)),
        "spec": {
            "selector": {"matchLabels": names.selector(service.name)},
            "podTargetLabels": [names.SERVICE_LABEL],
            "podMetricsEndpoints": [{"port": names.HTTP_PORT_NAME, "path": "/metrics"}],
        },
    }
