"""What the operator tells Prometheus: module-level, because prometheus_client's default registry is.

Set by the modules that know the values, served by __main__.py; imports nothing of ours.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

RECONCILES: Final = Counter("octavo_reconciles", "Reconciles that ended, by result.", ["result"])
RECONCILE_SECONDS: Final = Histogram(
    "octavo_reconcile_duration_seconds",
    "Time of one reconcile, with its calls to the API server.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
QUEUE_DEPTH: Final = Gauge("octavo_queue_depth", "InferenceServices that wait to be reconciled.")
API_WRITES: Final = Counter("octavo_api_writes", "Writes sent to the API server.", ["verb", "kind"])
WATCH_AGE_SECONDS: Final = Gauge(
    "octavo_watch_age_seconds", "Time since a watch last heard from the API server.", ["kind", "namespace"]
)
CACHED_OBJECTS: Final = Gauge("octavo_cached_objects", "Objects held in a cache.", ["kind", "namespace"])
