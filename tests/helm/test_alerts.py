"""The chart's alerts, judged by promtool: each fires when it should, and is silent when all is well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from prometheus_client import REGISTRY, generate_latest

from octavo_cluster import shell
from octavo_operator import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[2]
RULES: Final = ROOT / "helm" / "octavo" / "files" / "alerts.yaml"
ALERTS: Final[dict[str, dict[str, Any]]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}
READY: Final = "octavo_inference_service_ready"


def durations(name: str, *, below: str, above: str) -> dict[str, str]:
    """A histogram whose ten observations a minute lie between two bounds; at 0, below the first."""
    bucket = f"{name}_bucket"
    return {
        f'{bucket}{{le="{below}"}}': "0x120",
        f'{bucket}{{le="{above}"}}': "0+10x120",
        f'{bucket}{{le="+Inf"}}': "0+10x120",
    }


def service(status: str, reason: str) -> str:
    return f'{READY}{{namespace="a",name="llama",status="{status}",reason="{reason}"}}'


# alert -> series (values by the minute), minute at which it is looked at, its labels but severity; None: it is silent
CASES: Final[list[tuple[str, dict[str, str], int, dict[str, str] | None]]] = [
    ("OctavoOperatorAbsent", {}, 6, {}),
    ("OctavoOperatorAbsent", {"octavo_queue_depth": "0x20"}, 6, None),
    ("OctavoNoLeader", {'octavo_leader{lease="a/o",pod="1"}': "1 0x20"}, 4, {"lease": "a/o"}),
    (
        "OctavoNoLeader",
        {'octavo_leader{lease="a/o",pod="1"}': "1x9 0x20", 'octavo_leader{lease="a/o",pod="2"}': "0x9 1x20"},
        15,
        None,
    ),
    ("OctavoOperatorFault", {'octavo_reconcile_errors_total{reason="Fault"}': "0x5 1x20"}, 8, {}),
    ("OctavoOperatorFault", {'octavo_reconcile_errors_total{reason="Fault"}': "1x60"}, 30, None),
    (
        "OctavoReconcileErrors",
        {'octavo_reconcile_errors_total{reason="Forbidden"}': "0+1x60"},
        30,
        {"reason": "Forbidden"},
    ),
    ("OctavoReconcileErrors", {'octavo_reconcile_errors_total{reason="SpecInvalid"}': "0+1x60"}, 30, None),
    ("OctavoReconcileErrors", {'octavo_reconcile_errors_total{reason="Conflict"}': "0x5 1x60"}, 30, None),
    ("OctavoReconcileSlow", durations("octavo_reconcile_duration_seconds", below="5", above="10"), 30, {}),
    ("OctavoReconcileSlow", durations("octavo_reconcile_duration_seconds", below="0.1", above="0.25"), 30, None),
    ("OctavoQueueLate", durations("octavo_queue_duration_seconds", below="30", above="60"), 30, {}),
    ("OctavoQueueLate", durations("octavo_queue_duration_seconds", below="0.1", above="0.5"), 30, None),
    ("OctavoWatchSilent", {'octavo_watch_age_seconds{kind="Pod",namespace=""}': "0+60x20"}, 10, {"kind": "Pod"}),
    (
        "OctavoWatchSilent",
        {'octavo_watch_age_seconds{kind="Pod",namespace=""}': "0 30 0 30 0 30 0 30 0 30 0"},
        10,
        None,
    ),
    (
        "OctavoApiServerErrors",
        {
            'octavo_api_requests_total{method="GET",code="none"}': "0+1x60",
            'octavo_api_requests_total{method="PATCH",code="503"}': "0+1x60",
            'octavo_api_requests_total{method="GET",code="200"}': "0+10x60",
        },
        30,
        {},
    ),
    (
        "OctavoApiServerErrors",
        {
            'octavo_api_requests_total{method="GET",code="404"}': "0+10x60",
            'octavo_api_requests_total{method="PATCH",code="500"}': "0+1x60",
            'octavo_api_requests_total{method="GET",code="200"}': "0+10x60",
        },
        30,
        None,
    ),
    ("OctavoWritesNeverRest", {'octavo_api_writes_total{verb="apply",kind="Service"}': "0+600x120"}, 90, {}),
    ("OctavoWritesNeverRest", {'octavo_api_writes_total{verb="apply",kind="Service"}': "0+60x120"}, 90, None),
    (
        "OctavoServiceBroken",  # also where it is broken in one way and then in another
        {service("False", "Unschedulable"): "0x6", service("False", "OutOfMemory"): "_x6 0x20"},
        15,
        {"namespace": "a", "name": "llama"},
    ),
    ("OctavoServiceBroken", {service("False", "Suspended"): "0x60"}, 30, None),
    ("OctavoServiceBroken", {service("True", "Ready"): "1x60"}, 30, None),
    ("OctavoServiceBroken", {service("Unknown", "Loading"): "0x60"}, 30, None),
    ("OctavoServiceNotReady", {service("Unknown", "Loading"): "0x100"}, 70, {"namespace": "a", "name": "llama"}),
    ("OctavoServiceNotReady", {service("Unknown", "Loading"): "0x100"}, 50, None),
]


def promtool(folder: Path, *tests: dict[str, Any]) -> None:
    """Run unit tests of the rules, in Prometheus' own format."""
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", **test} for test in tests],
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(document))
    answer = shell.run(["promtool", "test", "rules", path], check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(("alert", "series", "minute", "labels"), CASES)
def test_an_alert_fires_when_it_should_and_only_then(
    tmp_path: Path, alert: str, series: dict[str, str], minute: int, labels: dict[str, str] | None
) -> None:
    firing = {
        "alertname": alert,
        "alertstate": "firing",
        "severity": ALERTS[alert]["labels"]["severity"],
        **(labels or {}),
    }
    given = ",".join(f'{name}="{value}"' for name, value in firing.items())
    expected = [] if labels is None else [{"labels": f"ALERTS{{{given}}}", "value": 1}]
    question = {
        "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
        "eval_time": f"{minute}m",
        "exp_samples": expected,
    }
    inputs = [{"series": name, "values": values} for name, values in series.items()]

    promtool(tmp_path, {"input_series": inputs, "promql_expr_test": [question]})


def test_an_alert_says_whose_it_is_and_how_to_look(tmp_path: Path) -> None:
    expected = {
        "exp_labels": {"severity": "warning", "namespace": "a", "name": "llama"},
        "exp_annotations": {
            "summary": "InferenceService a/llama has been broken for 10 minutes.",
            "description": "Its condition Ready says why: kubectl octavo status llama --namespace a",
        },
    }
    question = {"eval_time": "20m", "alertname": "OctavoServiceBroken", "exp_alerts": [expected]}

    promtool(
        tmp_path,
        {
            "input_series": [{"series": service("False", "OutOfMemory"), "values": "0x60"}],
            "alert_rule_test": [question],
        },
    )


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {alert for alert, *_, labels in CASES if labels is not None} == ALERTS.keys()
    assert {alert for alert, *_, labels in CASES if labels is None} == ALERTS.keys()


def test_promtool_finds_nothing_to_complain_about() -> None:
    answer = shell.run(["promtool", "check", "rules", "--lint-fatal", RULES])
    assert f"{len(ALERTS)} rules found" in answer.stdout


def test_the_alerts_ask_for_metrics_that_the_operator_has() -> None:
    assert metrics.RECONCILES is not None  # importing it is what registers them
    served = set(re.findall(r"^# TYPE (octavo_\w+)", generate_latest(REGISTRY).decode(), re.MULTILINE))
    asked = {
        name.removesuffix("_bucket") for rule in ALERTS.values() for name in re.findall(r"\boctavo_\w+", rule["expr"])
    }
    assert asked <= served
    assert len(asked) == 9


def test_every_alert_has_its_place_in_the_runbook() -> None:
    headings = re.findall(r"^### (Octavo\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == list(ALERTS)


@pytest.mark.apiserver
def test_the_chart_makes_them_a_prometheus_rule_as_they_are(template: Callable[..., list[dict[str, Any]]]) -> None:
    objects = template({"monitoring": {"alerts": True, "podMonitor": True, "labels": {"release": "monitoring"}}})
    (rule,) = [one for one in objects if one["kind"] == "PrometheusRule"]
    (monitor,) = [one for one in objects if one["kind"] == "PodMonitor"]
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]

    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert rule["metadata"]["labels"]["release"] == monitor["metadata"]["labels"]["release"] == "monitoring"
    assert monitor["spec"]["selector"] == deployment["spec"]["selector"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert endpoint["port"] in {port["name"] for port in ports}
    assert not [one for one in template() if one["kind"] in {"PrometheusRule", "PodMonitor"}]
