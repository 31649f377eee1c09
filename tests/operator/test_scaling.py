"""What is told of an autoscaler, and how fast it may be. The words follow 1.34's controller manager."""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import children
from octavo_operator.desired.load import SIGNALS
from octavo_operator.observe import Child, Observed
from octavo_operator.rollout import keeps_count
from octavo_operator.scaling import autoscaling

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
NO_API = (
    "the HPA was unable to compute the replica count: failed to get cpu utilization: unable to get metrics for "
    "resource cpu: unable to fetch metrics from resource metrics API: the server could not find the requested resource "
    "(get pods.metrics.k8s.io)"
)
NO_CUSTOM_API = (
    "the HPA was unable to compute the replica count: unable to get metric octavo_requests_waiting: unable to fetch "
    "metrics from custom metrics API: no custom metrics API (custom.metrics.k8s.io) registered"
)
NO_POD = "the HPA was unable to compute the replica count: failed to get cpu utilization: no metrics returned"


def service(behavior: Json | None = None, metric: str = "cpu", target: str | None = None) -> InferenceService:
    elastic: Json = {"maxReplicas": 9, "metric": metric, "target": target, "behavior": behavior}
    return InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "llama", "namespace": "models", "uid": "u", "generation": 4},
            "spec": {
                "model": {"source": "pvc://claim/model.gguf"},
                "autoscaling": elastic,
                "resources": {"requests": {"cpu": "1"}},
            },
        }
    )


def seen(kind: str, *conditions: Json) -> Observed:
    metadata = {"name": "llama", "namespace": "models", "uid": "x", "resourceVersion": "1"}
    child = Child.from_json(kind, {"metadata": metadata, "status": {"conditions": list(conditions)}})
    return Observed(children={(kind, "llama"): child})


def told(observed: Observed, of: InferenceService | None = None) -> tuple[str, str, str]:
    found = autoscaling(of or service(), observed)
    assert found is not None
    return found


def condition(type_: str, status: str, reason: str = "", message: str = "") -> Json:
    return {"type": type_, "status": status, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("conditions", "status", "reason", "part"),
    [
        ([], "Unknown", "NoMeasurementYet", "has not measured anything yet"),
        ([condition("ScalingActive", "True", "ValidMetricFound")], "True", "Scaling", "follows the load"),
        (
            [condition("ScalingActive", "False", "FailedGetResourceMetric", NO_API)],
            *("False", "NoMetricsAPI", "install metrics-server"),
        ),
        (
            [condition("ScalingActive", "False", "FailedGetResourceMetric", NO_POD)],
            *("False", "NoMetrics", "no metrics returned"),
        ),
        (
            [
                condition(
                    "ScalingActive", "False", "ScalingDisabled", "scaling is disabled since the replica count is 0"
                )
            ],
            *("False", "ScalingDisabled", "the replica count is 0"),
        ),
        (
            [condition("AbleToScale", "False", "FailedGetScale", "deployments.apps is forbidden")],
            *("False", "UnableToScale", "deployments.apps is forbidden"),
        ),
    ],
)
def test_whether_the_autoscaler_works_is_told_with_what_it_lacks(
    conditions: list[Json], status: str, reason: str, part: str
) -> None:
    found = told(seen("HorizontalPodAutoscaler", *conditions))
    assert found[:2] == (status, reason)
    assert part in found[2]


def test_without_an_api_for_what_the_engine_measures_it_is_told_what_to_install() -> None:
    lacking = condition("ScalingActive", "False", "FailedGetPodsMetric", NO_CUSTOM_API)
    status, reason, text = told(seen("HorizontalPodAutoscaler", lacking), service(metric="queue"))
    assert (status, reason) == ("False", "NoMetricsAPI")
    assert "prometheus.url" in text
    assert "manifests/prometheus-adapter.yaml" in text
    assert (ROOT / "manifests/prometheus-adapter.yaml").is_file()


PROMETHEUS: Final = "http://prometheus.monitoring.svc:9090"


def scaler(metric: str, target: str | None = None, *, keda: bool = False, url: str | None = PROMETHEUS) -> Json:
    """What scales by a metric: the spec of the autoscaler, or of KEDA's object."""
    offered = ["ScaledObject"] if keda else []
    manifests = children(service(None, metric, target), engine_image="e", offered=offered, prometheus_url=url)
    (found,) = (each for each in manifests if each["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"})
    assert found["kind"] == ("ScaledObject" if keda else "HorizontalPodAutoscaler")
    spec: Json = found["spec"]
    return spec


@pytest.mark.parametrize(
    ("metric", "target", "name", "value"),
    [
        ("queue", None, "octavo_requests_waiting", "4"),
        ("queue", "10", "octavo_requests_waiting", "10"),
        ("kvCache", None, "octavo_kv_cache_usage", "0.8"),
        ("kvCache", "100", "octavo_kv_cache_usage", "1"),
        ("tokens", "20000", "octavo_tokens_per_second", "20000"),
    ],
)
def test_what_the_engine_measures_is_a_metric_of_the_pods(
    metric: str, target: str | None, name: str, value: str
) -> None:
    (found,) = scaler(metric, target)["metrics"]
    averaged = {"type": "AverageValue", "averageValue": value}
    assert found == {"type": "Pods", "pods": {"metric": {"name": name}, "target": averaged}}


def test_keda_asks_prometheus_for_this_service_only_and_holds_no_answer_for_no_load() -> None:
    (trigger,) = scaler("tokens", "500", keda=True)["triggers"]
    labels = 'namespace="models",serving_octavo_dev_service="llama"'
    assert trigger == {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": PROMETHEUS,
            "query": f"sum(rate(vllm:generation_tokens_total{{{labels}}}[1m]))",
            "threshold": "500",
            "ignoreNullValues": "false",
        },
    }


def test_where_keda_knows_no_prometheus_it_scales_by_cpu_only() -> None:
    (trigger,) = scaler("cpu", keda=True, url=None)["triggers"]
    assert trigger == {"type": "cpu", "metricType": "Utilization", "metadata": {"value": "80"}}
    (metric,) = scaler("queue", keda=False, url=None)["metrics"]
    manifests = children(service(None, "queue"), engine_image="e", offered=["ScaledObject"])
    (found,) = (each["spec"]["metrics"] for each in manifests if each["kind"] == "HorizontalPodAutoscaler")
    assert found == [metric]


def test_the_shipped_rules_serve_every_metric_from_the_series_that_is_meant() -> None:
    rules = yaml.safe_load((ROOT / "manifests/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    matchers = "<<.LabelMatchers>>"
    assert [(rule["name"]["as"], rule["seriesQuery"], rule["metricsQuery"]) for rule in rules] == [
        (
            signal.pods_metric,
            f'{signal.series}{{namespace!="",pod!=""}}',
            f"sum({signal.expression.format(series=f'<<.Series>>{{{matchers}}}')}) by (<<.GroupBy>>)",
        )
        for signal in SIGNALS.values()
    ]
    for rule in rules:
        assert rule["resources"]["overrides"] == {
            "namespace": {"resource": "namespace"},
            "pod": {"resource": "pod"},
        }


def test_where_keda_scales_it_is_asked() -> None:
    assert told(seen("ScaledObject"))[:2] == ("Unknown", "NoMeasurementYet")
    assert told(seen("ScaledObject", condition("Ready", "True")))[:2] == ("True", "Scaling")
    broken = condition("Ready", "False", "ScaledObjectCheckFailed", "no such trigger")
    assert told(seen("ScaledObject", broken)) == ("False", "ScaledObjectNotReady", "no such trigger")


def test_before_there_is_an_autoscaler_nothing_is_known() -> None:
    assert told(Observed(children={}))[0] == "Unknown"


def behavior(of: Json | None) -> Json:
    hpa = {child["kind"]: child for child in children(service(of), engine_image="e")}["HorizontalPodAutoscaler"]
    keda = {child["kind"]: child for child in children(service(of), engine_image="e", offered=["ScaledObject"])}
    found: Json = hpa["spec"]["behavior"]
    assert keda["ScaledObject"]["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == found
    return found


def test_by_default_one_pod_a_minute_goes_and_none_in_a_lull() -> None:
    gentle = {
        "stabilizationWindowSeconds": 300,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
    }
    assert behavior(None) == {"scaleDown": gentle}
    fast = {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]}
    assert behavior({"scaleUp": fast}) == {"scaleUp": fast, "scaleDown": gentle}
    assert behavior({"scaleDown": fast})["scaleDown"] == {**gentle, **fast}
    assert behavior({"scaleDown": {"selectPolicy": "Disabled"}})["scaleDown"]["selectPolicy"] == "Disabled"


def test_a_number_that_is_not_ours_is_kept_and_ours_is_not() -> None:
    def deployment(fields: Json | None) -> Observed:
        entry = {"manager": names.FIELD_MANAGER, "operation": "Apply", "fieldsV1": fields}
        metadata = {"name": "llama", "namespace": "models", "uid": "x", "resourceVersion": "1"}
        body = {"metadata": {**metadata, "managedFields": [] if fields is None else [entry]}}
        return Observed(children={("Deployment", "llama"): Child.from_json("Deployment", body)})

    assert keeps_count(deployment({"f:spec": {"f:template": {}}}), "llama")
    assert not keeps_count(deployment({"f:spec": {"f:replicas": {}}}), "llama")
    assert not keeps_count(deployment(None), "llama")
    assert not keeps_count(Observed(children={}), "llama")
