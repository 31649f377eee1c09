"""The HorizontalPodAutoscaler, for services that ask for one. Called by desired.children; pure."""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import AutoscalingSpec, InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService, autoscaling: AutoscalingSpec) -> Manifest:
    """The manifest of the autoscaler of the Deployment."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": object_meta(service, names.autoscaler(service.name)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.deployment(service.name)},
            "minReplicas": autoscaling.min_replicas,
            "maxReplicas": autoscaling.max_replicas,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {
                        "name": autoscaling.metric,
                        "target": {"type": "Utilization", "averageUtilization": int(autoscaling.target)},
                    },
                }
            ],
        },
    }
