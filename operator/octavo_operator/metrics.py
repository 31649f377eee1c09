"""What the operator tells Prometheus: module-level, because prometheus_client's default registry is.

Set by the modules that know the values, served by __main__.py; imports nothing of ours. Alerts on them are in
helm/octavo/files/alerts.yaml, what to do about those in docs/runbook.md. Requests that kopf sends by itself, at its
start, are not counted.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

NO_ANSWER: Final = "none"  # the code of a request that the API server has not answered
FAULT: Final = "Fault"  # the reason of a reconcile that met a fault of our own

RECONCILES: Final = Counter("octavo_reconciles", "Reconciles that ended, by result.", ["result"])
RECONCILE_ERRORS: Final = Counter(
    "octavo_reconcile_errors",
    "Reconciles that failed, by the class of errors.py; Fault is a fault of the operator itself.",
    ["reason"],
)
RECONCILE_ERRORS.labels(reason=FAULT)  # a series from the start: Prometheus sees no increase in one that begins at 1
RECONCILE_SECONDS: Final = Histogram(
    "octavo_reconcile_duration_seconds",
    "Time of one reconcile, with its calls to the API server.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
QUEUE_DEPTH: Final = Gauge("octavo_queue_depth", "InferenceServices that wait to be reconciled.")
QUEUE_SECONDS: Final = Histogram(
    "octavo_queue_duration_seconds",
    "How much later than it was due an InferenceService was taken from the queue.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300),
)
API_REQUESTS: Final = Counter(
    "octavo_api_requests",
    "Requests to the API server, by the HTTP status that it answered; none: it did not answer.",
    ["method", "code"],
)
API_WRITES: Final = Counter("octavo_api_writes", "Writes sent to the API server.", ["verb", "kind"])
WATCH_AGE_SECONDS: Final = Gauge(
    "octavo_watch_age_seconds", "Time since a watch last heard from the API server.", ["kind", "namespace"]
)
LEADER: Final = Gauge("octavo_leader", "1 while this operator holds the lease and writes, else 0.", ["lease"])
CACHED_OBJECTS: Final = Gauge("octavo_cached_objects", "Objects held in a cache.", ["kind", "namespace"])


class Readiness(Collector):
    """Ready of every InferenceService, as the operator told it last.

    The series of a service is one at any time, although its reason is a label.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], tuple[str, str]] = {}

    def tell(self, namespace: str, name: str, *, status: str, reason: str) -> None:
        """Take in the condition Ready of a service."""
        self._told[namespace, name] = status, reason

    def forget(self, namespace: str, name: str) -> None:
        """The service is gone."""
        self._told.pop((namespace, name), None)

    def forget_all(self) -> None:
        """It is another operator's to tell now."""
        self._told.clear()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The series; called by the thread that serves /metrics."""
        family = GaugeMetricFamily(
            "octavo_inference_service_ready",
            "1 where the condition Ready of an InferenceService is True, else 0, with its status and reason.",
            labels=["namespace", "name", "status", "reason"],
        )
        for (namespace, name), (status, reason) in list(self._told.items()):
            family.add_metric([namespace, name, status, reason], float(status == "True"))
        yield family


READINESS: Final = Readiness()
REGISTRY.register(READINESS)
