"""Whether the autoscaler can do its work: the condition Autoscaling. Pure; called by status.py."""

import re
from collections.abc import Mapping
from typing import Any, Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.diagnosis import stable
from octavo_operator.observe import Observed
from octavo_operator.resources import AUTOSCALER, SCALED_OBJECT, Json

Told = tuple[str, str, str]  # status, reason, message of a condition

_NO_API_OF_RESOURCES: Final = (
    "the cluster has no metrics API (metrics.k8s.io), so the number of replicas stays: install metrics-server"
)
_NO_API_OF_PODS: Final = (
    "the cluster has no metrics API for what the engine measures (custom.metrics.k8s.io), so the number of replicas "
    "stays: install Prometheus, and KEDA (and tell the operator by its chart's prometheus.url where Prometheus is) or "
    "prometheus-adapter with the rules of manifests/prometheus-adapter.yaml"
)


def autoscaling(service: InferenceService, observed: Observed) -> Told | None:
    """What to tell of the autoscaler; None for a service without one."""
    if service.spec.autoscaling is None:
        return None
    if (scaled := observed.child(SCALED_OBJECT.kind, names.scaled_object(service.name))) is not None:
        return _of_keda(_by_type(scaled.status))
    autoscaler = observed.child(AUTOSCALER.kind, names.autoscaler(service.name))
    conditions = _by_type({} if autoscaler is None else autoscaler.status)
    return _of_autoscaler(conditions, service.spec.autoscaling.metric)


def _by_type(status: Mapping[str, Any]) -> dict[str, Json]:
    return {condition["type"]: condition for condition in status.get("conditions", ())}


def _of_autoscaler(conditions: dict[str, Json], metric: str) -> Told:
    able, active = conditions.get("AbleToScale", {}), conditions.get("ScalingActive", {})
    if able.get("status") == "False":
        return "False", "UnableToScale", stable(able.get("message", ""))
    if active.get("status") == "True":
        return "True", "Scaling", "the number of replicas follows the load"
    if active.get("status") != "False":
        return "Unknown", "NoMeasurementYet", "the autoscaler has not measured anything yet"
    message = stable(active.get("message", ""))
    if active.get("reason") == "ScalingDisabled":
        return "False", "ScalingDisabled", message
    if re.search(r"could not find the requested resource|no custom metrics API .* registered", message):
        return "False", "NoMetricsAPI", _NO_API_OF_RESOURCES if metric == "cpu" else _NO_API_OF_PODS
    return "False", "NoMetrics", f"nothing is measured, so the number of replicas stays: {message}"


def _of_keda(conditions: dict[str, Json]) -> Told:
    ready = conditions.get("Ready", {})
    if ready.get("status") == "True":
        return "True", "Scaling", "the number of replicas follows the load, by KEDA"
    if ready.get("status") == "False":
        return "False", "ScaledObjectNotReady", stable(ready.get("message", "")) or "KEDA does not say why"
    return "Unknown", "NoMeasurementYet", "KEDA has not looked at the ScaledObject yet"
