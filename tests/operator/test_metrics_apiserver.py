"""The operator's metrics while it works on a real API server, and what `helm test` makes of them."""

import sys
import urllib.request
from pathlib import Path
from typing import Final

import pytest

from octavo_cluster import shell
from octavo_cluster.playground import HEALTH_PORT, METRICS_PORT, Playground, eventually

pytestmark = pytest.mark.apiserver

ASK: Final = Path(__file__).parents[2] / "helm" / "octavo" / "files" / "ask.py"
HEALTH: Final = f"http://127.0.0.1:{HEALTH_PORT}/healthz"
METRICS: Final = f"http://127.0.0.1:{METRICS_PORT}/metrics"


def scrape() -> list[str]:
    """The lines of /metrics."""
    with urllib.request.urlopen(METRICS, timeout=5) as answer:
        text: str = answer.read().decode()
    return text.splitlines()


def test_the_metrics_tell_what_happens(playground: Playground) -> None:
    def ready(status: str, reason: str) -> str:
        labels = f'name="llama",namespace="{playground.namespace}",reason="{reason}",status="{status}"'
        return f"octavo_inference_service_ready{{{labels}}}"

    with playground.operator() as operator:
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        eventually(lambda: f"{ready('Unknown', 'Starting')} 0.0" in scrape(), "the service that starts")
        playground.play_deployment_controller(replicas=1, ready=1)
        eventually(lambda: f"{ready('True', 'Ready')} 1.0" in scrape(), "the service that is ready")
        for method, code, least in (("GET", 200, 5), ("PATCH", 201, 5), ("PATCH", 200, 2), ("POST", 201, 2)):
            assert operator.metric(f'octavo_api_requests_total{{code="{code}",method="{method}"}}') >= least
        assert operator.metric("octavo_queue_duration_seconds_count") >= 2
        assert operator.metric("octavo_reconcile_duration_seconds_count") >= 2
        pods = f'{{kind="Pod",namespace="{playground.namespace}"}}'
        assert 0 <= operator.metric(f"octavo_watch_age_seconds{pods}") < 40
        assert f"octavo_cached_objects{pods} 0.0" in scrape()
        playground.kubectl("delete", "ois", "llama")
        eventually(lambda: not any("octavo_inference_service_ready{" in line for line in scrape()), "no service")


def test_helm_test_asks_the_operator_and_says_where_it_had_no_answer(playground: Playground) -> None:
    with playground.operator():
        answer = shell.run([sys.executable, ASK, HEALTH, METRICS])
        assert answer.stdout == "The operator is healthy and follows the cluster.\n"

    silent = shell.run([sys.executable, ASK, HEALTH, METRICS, "0"], check=False)
    assert silent.returncode == 1
    assert silent.stderr.startswith(HEALTH)
