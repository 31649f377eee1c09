"""The HorizontalPodAutoscaler, for services that ask for one. Called by desired.children; pure."""

from typing import Final

from octavo_operator import names
from octavo_operator.api.autoscaling import AutoscalingSpec
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.load import SIGNALS, threshold
from octavo_operator.desired.metadata import Manifest, object_meta

# A replica that has loaded its model is worth keeping: one goes at a time, and none because of a short lull.
GENTLE: Final = {
    "stabilizationWindowSeconds": 300,
    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
}


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
            "metrics": [_metric(autoscaling)],
            "behavior": behavior(autoscaling),
        },
    }


def _metric(autoscaling: AutoscalingSpec) -> Manifest:
    if autoscaling.metric == "cpu":
        target: Manifest = {"type": "Utilization", "averageUtilization": int(autoscaling.wanted)}
        return {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    target = {"type": "AverageValue", "averageValue": threshold(autoscaling)}
    return {"type": "Pods", "pods": {"metric": {"name": SIGNALS[autoscaling.metric].pods_metric}, "target": target}}


def behavior(autoscaling: AutoscalingSpec) -> Manifest:
    """How fast the number changes: as the spec says, and gently down where it says nothing."""
    wanted = {} if autoscaling.behavior is None else autoscaling.behavior.to_dict()
    return {**wanted, "scaleDown": {**GENTLE, **wanted.get("scaleDown", {})}}
