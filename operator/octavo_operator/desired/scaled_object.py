"""KEDA's ScaledObject, which takes the place of the HorizontalPodAutoscaler where KEDA is installed.

Called by desired.children; pure. KEDA makes an autoscaler of its own from it, so there must not be another.
"""

from octavo_operator import names
from octavo_operator.api.autoscaling import AutoscalingSpec
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.autoscaler import behavior
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService, autoscaling: AutoscalingSpec) -> Manifest:
    """The manifest of the ScaledObject of the Deployment."""
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": object_meta(service, names.scaled_object(service.name)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.deployment(service.name)},
            "minReplicaCount": autoscaling.min_replicas,
            "maxReplicaCount": autoscaling.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(autoscaling)}},
            "triggers": [
                {"type": autoscaling.metric, "metricType": "Utilization", "metadata": {"value": autoscaling.target}}
            ],
        },
    }
