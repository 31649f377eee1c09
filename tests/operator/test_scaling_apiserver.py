"""Who says how many pods there are: the spec, `kubectl scale`, an autoscaler of ours or of somebody else's."""

import json
from typing import Any

import pytest

from octavo_cluster.playground import Playground, eventually

pytestmark = pytest.mark.apiserver


def replicas(playground: Playground) -> Any:
    return playground.there("deployment")["spec"]["replicas"]


def test_kubectl_scale_is_followed_and_its_selector_and_counts_are_served(playground: Playground) -> None:
    with playground.operator():
        playground.apply(replicas=1)
        playground.await_ready("Unknown", "Starting")
        playground.kubectl("scale", "ois", "llama", "--replicas=4")
        eventually(lambda: replicas(playground) == 4, "4 replicas")
        playground.play_deployment_controller(replicas=4, ready=4)
        playground.await_ready("True", "Ready")
        scale = json.loads(playground.kubectl("get", "ois", "llama", "--subresource=scale", "--output=json"))
        assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (4, 4)
        assert scale["status"]["selector"] == "app.kubernetes.io/component=engine,serving.octavo.dev/service=llama"


def test_somebody_elses_autoscaler_of_the_deployment_is_not_fought(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        for wanted in (5, 3):
            playground.patch("deployment", {"spec": {"replicas": wanted}}, subresource="scale")
            operator.rest(reconciles=2)
            assert replicas(playground) == wanted
        written = len(playground.audit())
        playground.kubectl("label", "ois", "llama", "touched=yes")
        operator.rest(reconciles=3)
        assert playground.audit()[written:] == []
        playground.apply(replicas=2)  # now the spec says it
        eventually(lambda: replicas(playground) == 2, "2 replicas")


def test_what_a_metric_lacks_is_told_in_the_autoscalers_words(playground: Playground) -> None:
    with playground.operator():
        playground.apply(autoscaling={"maxReplicas": 9, "metric": "queue"})
        eventually(lambda: playground.condition("Autoscaling").get("reason") == "NoMeasurementYet", "the condition")
        (metric,) = playground.there("hpa")["spec"]["metrics"]
        assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "4"}
        lacking = {
            "type": "ScalingActive",
            "status": "False",
            "reason": "FailedGetPodsMetric",
            "message": "unable to fetch metrics from custom metrics API: no custom metrics API "
            "(custom.metrics.k8s.io) registered",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        status = {"currentReplicas": 1, "desiredReplicas": 1, "conditions": [lacking]}
        playground.patch("hpa", {"status": status}, subresource="status")
        eventually(lambda: playground.condition("Autoscaling")["reason"] == "NoMetricsAPI", "what it lacks")
