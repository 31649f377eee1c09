"""KEDA's ScaledObject, which takes the place of the HorizontalPodAutoscaler where KEDA is installed.

Called by desired.children; pure. KEDA makes an autoscaler of its own from it, so there must not be another.
"""

from octavo_operator import names
from octavo_operator.api.autoscaling import AutoscalingSpec
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.autoscaler import behavior
from octavo_operator.desired.load import query, threshold
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService, autoscaling: AutoscalingSpec, prometheus_url: str | None) -> Manifest:
    """The manifest of the ScaledObject of the Deployment.

    Args:
        service: the resource.
        autoscaling: its spec.autoscaling.
        prometheus_url: where KEDA asks for every metric but cpu.
    """
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": object_meta(service, names.scaled_object(service.name)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.deployment(service.name)},
            "minReplicaCount": autoscaling.min_replicas,
            "maxReplicaCount": autoscaling.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(autoscaling)}},
            "triggers": [_trigger(service, autoscaling, prometheus_url)],
        },
    }


def can_measure(autoscaling: AutoscalingSpec, prometheus_url: str | None) -> bool:
    """Whether KEDA gets at the metric."""
    return autoscaling.metric == "cpu" or prometheus_url is not None


def _trigger(service: InferenceService, autoscaling: AutoscalingSpec, prometheus_url: str | None) -> Manifest:
    if autoscaling.metric == "cpu":
        return {"type": "cpu", "metricType": "Utilization", "metadata": {"value": autoscaling.wanted}}
    assert prometheus_url is not None
    metadata = {
        "serverAddress": prometheus_url,
        "query": query(service, autoscaling),
        "threshold": threshold(autoscaling),
        "ignoreNullValues": "false",  # else pods would go when Prometheus loses sight of them
    }
    return {"type": "prometheus", "metricType": "AverageValue", "metadata": metadata}
