"""What is told of an autoscaler, and how fast it may be. The words follow 1.34's controller manager."""

from typing import Any

import pytest

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import children
from octavo_operator.observe import Child, Observed
from octavo_operator.rollout import keeps_count
from octavo_operator.scaling import autoscaling

Json = dict[str, Any]

NO_API = (
    "the HPA was unable to compute the replica count: failed to get cpu utilization: unable to get metrics for "
    "resource cpu: unable to fetch metrics from resource metrics API: the server could not find the requested resource "
    "(get pods.metrics.k8s.io)"
)
NO_POD = "the HPA was unable to compute the replica count: failed to get cpu utilization: no metrics returned"


def service(behavior: Json | None = None) -> InferenceService:
    elastic: Json = {"maxReplicas": 9, **({} if behavior is None else {"behavior": behavior})}
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


def told(observed: Observed) -> tuple[str, str, str]:
    found = autoscaling(service(), observed)
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
