"""What is told as an event, and that nothing is told twice."""

from dataclasses import replace
from typing import Any

from tests.operator.conftest import REFUSAL, RUNNING, deployment, engine, pod, service, tell, terminated

from octavo_operator.decide import Plan
from octavo_operator.events import Event, of_plan, of_transition
from octavo_operator.observe import Owner

Json = dict[str, Any]


def test_ready_is_told_as_an_event_when_its_status_or_reason_changes() -> None:
    loading = tell(pod(**engine(RUNNING)))
    broken = tell(pod(**engine(terminated(REFUSAL))), previous=loading)
    assert of_transition({}, loading) == [Event("Normal", "Loading", "Reconcile", "1 of 1 pods load the model")]
    assert of_transition(loading, loading) == []
    assert of_transition(loading, broken) == [
        Event("Warning", "DeviceMissing", "Reconcile", "no CUDA device: set accelerator.type to cpu")
    ]
    suspended = tell(of=service(replicas=0), there=deployment(0))
    assert [event.type for event in of_transition(broken, suspended)] == ["Normal"]


def test_every_tenth_of_a_load_is_an_event() -> None:
    def loading(percent: int, previous: Json) -> Json:
        return tell(replace(pod(**engine(RUNNING)), percent=percent), previous=previous)

    first = tell(pod(**engine(RUNNING)))
    second = loading(10, first)
    assert [event.note for event in of_transition(first, second)] == ["1 of 1 pods load the model: 10 %"]
    assert of_transition(second, loading(10, second)) == []
    assert of_transition(second, first) == []


def test_children_that_come_and_go_are_told_as_events() -> None:
    gone = replace(deployment(), kind="HorizontalPodAutoscaler", owner=Owner(kind="x", name="y", uid="z"))
    made = {"kind": "Service", "metadata": {"name": "llama"}}
    assert of_plan(Plan(delete=(gone,)), [made]) == [
        Event("Normal", "Created", "Apply", "created Service llama"),
        Event("Normal", "Deleted", "Delete", "deleted HorizontalPodAutoscaler llama"),
    ]
    books = {"kind": "ControllerRevision", "metadata": {"name": "llama-0123456789"}}
    assert of_plan(Plan(delete=(replace(gone, kind="ControllerRevision"),)), [books]) == []
