"""What an autoscaler measures, by spec.autoscaling.metric: the one table of it. Used by this package's builders; pure.

CPU is measured by the cluster (metrics-server). The rest comes from the engine's own metrics by way of Prometheus, and
from there by KEDA, which is given a query, or by prometheus-adapter, which serves them under the names here; its rules
are in manifests/prometheus-adapter.yaml. Either way the sum over the pods divided by the target is the number of pods.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from octavo_operator import names
from octavo_operator.api.autoscaling import AutoscalingSpec
from octavo_operator.api.v1alpha1 import InferenceService

# How Prometheus calls the label of pods by which the operator's PodMonitor tells services apart.
SERVICE_LABEL: Final = names.SERVICE_LABEL.translate(str.maketrans("./-", "___"))


@dataclass(frozen=True, slots=True)
class Signal:
    """One measure of the load of a pod."""

    pods_metric: str  # its name in custom.metrics.k8s.io
    series: str  # the engine's, in Prometheus
    expression: str  # PromQL of one pod's value; {series} stands for the series with its labels
    unit: Decimal = Decimal(1)  # of the target, in that of the series


SIGNALS: Final = {
    "queue": Signal("octavo_requests_waiting", "vllm:num_requests_waiting", "{series}"),
    "kvCache": Signal("octavo_kv_cache_usage", "vllm:kv_cache_usage_perc", "{series}", Decimal("0.01")),
    "tokens": Signal("octavo_tokens_per_second", "vllm:generation_tokens_total", "rate({series}[1m])"),
}


def threshold(autoscaling: AutoscalingSpec) -> str:
    """The target of each pod, in the unit of what is measured; also a quantity as Kubernetes writes them."""
    value = Decimal(autoscaling.wanted) * SIGNALS[autoscaling.metric].unit
    return f"{value.normalize():f}"


def query(service: InferenceService, autoscaling: AutoscalingSpec) -> str:
    """PromQL for the sum over the service's pods; nothing where Prometheus knows none of them."""
    signal = SIGNALS[autoscaling.metric]
    labels = f'namespace="{service.metadata.namespace or "default"}",{SERVICE_LABEL}="{service.name}"'
    return f"sum({signal.expression.format(series=f'{signal.series}{{{labels}}}')})"
