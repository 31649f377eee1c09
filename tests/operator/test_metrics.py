"""What the operator counts of itself."""

from kubernetes.aio.client import Configuration
from prometheus_client import REGISTRY, generate_latest

from octavo_operator import metrics
from octavo_operator.errors import ApiUnavailable, Conflict, Forbidden, NotFound, Refused, SpecInvalid
from octavo_operator.kube import Kube
from octavo_operator.metrics import Readiness
from octavo_operator.reconcile import Reconciler
from octavo_operator.resources import Key
from octavo_operator.settings import Settings


def sample(name: str, **labels: str) -> float:
    """A sample of the process, 0 while there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def ready_series(readiness: Readiness) -> list[tuple[dict[str, str], float]]:
    return [(each.labels, each.value) for family in readiness.collect() for each in family.samples]


async def test_a_reconcile_that_fails_is_counted_by_its_reason_and_so_is_a_request_without_an_answer() -> None:
    async with Kube(Configuration(host="http://127.0.0.1:1")) as kube:
        reconciler = Reconciler(kube, Settings(engine_image="e"))
        failed, unanswered = (
            sample("octavo_reconcile_errors_total", reason="ApiUnavailable"),
            sample("octavo_api_requests_total", method="GET", code="none"),
        )
        assert await reconciler._reconcile_and_requeue(Key("ns", "llama")) == "error"
        assert sample("octavo_reconcile_errors_total", reason="ApiUnavailable") == failed + 1
        assert sample("octavo_api_requests_total", method="GET", code="none") == unanswered + 1


async def test_every_error_of_the_tree_has_its_own_reason() -> None:
    async with Kube(Configuration(host="http://127.0.0.1:1")) as kube:
        reconciler = Reconciler(kube, Settings(engine_image="e"))
        for error in (
            SpecInvalid("no"),
            *(kind("no") for kind in (ApiUnavailable, Conflict, NotFound, Forbidden, Refused)),
        ):
            reason = type(error).__name__
            before = sample("octavo_reconcile_errors_total", reason=reason)
            reconciler._retry(Key("ns", "llama"), error)
            assert sample("octavo_reconcile_errors_total", reason=reason) == before + 1


async def test_how_late_a_service_was_taken_from_the_queue_is_measured() -> None:
    async with Kube(Configuration(host="http://127.0.0.1:1")) as kube:
        reconciler = Reconciler(kube, Settings(engine_image="e"))
        before = sample("octavo_queue_duration_seconds_count")
        reconciler.queue.add(Key("ns", "llama"))
        await reconciler.queue.get()
        assert sample("octavo_queue_duration_seconds_count") == before + 1


def test_faults_are_a_series_before_the_first_one() -> None:
    assert 'octavo_reconcile_errors_total{reason="Fault"} ' in generate_latest(REGISTRY).decode()
    assert metrics.FAULT == "Fault"


def test_a_service_has_one_series_whatever_was_told_of_it_before() -> None:
    readiness = Readiness()
    readiness.tell("ns", "llama", status="Unknown", reason="Loading")
    readiness.tell("ns", "llama", status="True", reason="Ready")
    readiness.tell("ns", "gemma", status="False", reason="Unschedulable")
    llama = {"namespace": "ns", "name": "llama", "status": "True", "reason": "Ready"}
    gemma = {"namespace": "ns", "name": "gemma", "status": "False", "reason": "Unschedulable"}
    assert ready_series(readiness) == [(llama, 1.0), (gemma, 0.0)]
    readiness.forget("ns", "llama")
    readiness.forget("ns", "never told of")
    assert ready_series(readiness) == [(gemma, 0.0)]
