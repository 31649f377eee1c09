"""When pods are replaced, and in which order. test_rollout_apiserver.py has the same before a real API server."""

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.operator.conftest import NOW, deployment, service

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import children
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.rollout import Frozen, choose_order, freeze, has_lost_revision

Json = dict[str, Any]

ONE_POD_VOLUME = {"source": "hf://org/repo:model.gguf", "cache": {"size": "1Gi"}}


def asking(update: str) -> InferenceService:
    """A service whose annotation asks for a newer rendering."""
    return service(1, {names.UPDATE_ANNOTATION: update})


# The order


def waiting_pod(seconds: float, resource: str = "nvidia.com/gpu") -> Pod:
    since = (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = f"0/1 nodes are available: 1 Insufficient {resource}."
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return Pod.from_json(
        {
            "metadata": {"name": "p", "namespace": "models", "resourceVersion": "1", "labels": names.labels("llama")},
            "status": {"phase": "Pending", "conditions": [{**scheduled, "lastTransitionTime": since}]},
        }
    )


def order(there: Child | None, *pods: Pod, **spec: Any) -> tuple[bool, float | None]:
    found = {} if there is None else {("Deployment", "llama"): there}
    chosen = choose_order(service(**spec), Observed(children=found, pods=pods), NOW)
    return chosen.ends_first, chosen.look_again


def test_a_new_pod_comes_first_and_for_twenty_seconds_it_may_wait_for_gpus() -> None:
    assert order(None) == (False, None)
    assert order(deployment(3, updated=1)) == (False, None)
    assert order(deployment(3, updated=1), waiting_pod(5)) == (False, 15.0)
    assert order(deployment(3, updated=1), waiting_pod(19)) == (False, 1.0)


def test_then_an_old_pod_goes_first_until_no_old_one_is_left() -> None:
    assert order(deployment(3, updated=1), waiting_pod(20)) == (True, None)
    assert order(deployment(2, updated=1, max_surge=0)) == (True, None)
    assert order(deployment(2, updated=1, max_surge=0, seen=False)) == (True, None)
    assert order(deployment(2, updated=2, max_surge=0)) == (False, None)


def test_gpus_that_no_old_pod_holds_and_other_wants_change_nothing() -> None:
    assert order(deployment(2, updated=2), waiting_pod(60)) == (False, None)
    assert order(deployment(3, updated=1), waiting_pod(60, "memory")) == (False, None)
    assert order(deployment(3, updated=1), replace(waiting_pod(60), deleting=True)) == (False, None)


def test_the_strategy_of_the_spec_goes_before() -> None:
    assert order(deployment(3, updated=1), waiting_pod(60), rollout={"strategy": "surge"}) == (False, None)
    assert order(None, rollout={"strategy": "replace"}) == (True, None)


def test_pods_that_share_a_volume_for_one_never_overlap() -> None:
    assert order(None, model=ONE_POD_VOLUME) == (True, None)
    assert order(None, model={**ONE_POD_VOLUME, "cache": {"size": "1Gi", "accessMode": "ReadWriteMany"}})[0] is False
    assert order(None, model={**ONE_POD_VOLUME, "cache": {"claimName": "shared"}})[0] is False


# What is kept


def stored(body: Json) -> Child:
    """A manifest as a live object."""
    metadata = {**body["metadata"], "uid": "r", "resourceVersion": "1"}
    return Child.from_json(body["kind"], json.loads(json.dumps({**body, "metadata": metadata})))


def apply(
    it: InferenceService,
    before: Frozen | None = None,
    image: str = "engine:1",
    *,
    forgotten: Json | None = None,
) -> Frozen:
    """Freeze what an operator with this engine image renders, after `before` was applied.

    `forgotten`: the template of the Deployment, where the revision with it has been deleted since.
    """
    applied = before.manifests if before is not None else ()
    there = {(each["kind"], each["metadata"]["name"]): stored(each) for each in applied}
    if forgotten is not None:
        there = {key: child for key, child in there.items() if key[0] != "ControllerRevision"}
    seen = Observed(children=there)
    lost = forgotten if has_lost_revision(it, observed_generation=1, observed=seen) else None
    return freeze(it, children(it, engine_image=image), seen, lost)


def revision(of: Frozen) -> Json:
    (found,) = (each for each in of.manifests if each["kind"] == "ControllerRevision")
    return found


def test_the_first_template_is_the_rendered_one_and_is_kept() -> None:
    first = apply(service(1))
    assert (first.engine_image, first.update_available) == ("engine:1", False)
    deployment = next(each for each in first.manifests if each["kind"] == "Deployment")
    assert revision(first)["data"] == {"template": deployment["spec"]["template"]}
    assert apply(service(1), first) == first


def test_another_operator_leaves_the_pods_and_says_so() -> None:
    first = apply(service(1))
    upgraded = apply(service(1), first, image="engine:2")
    assert (upgraded.engine_image, upgraded.update_available) == ("engine:1", True)
    assert revision(upgraded)["metadata"]["name"] == revision(first)["metadata"]["name"]
    assert apply(service(1), upgraded, image="engine:2") == upgraded
    # Back again, as after a failed upgrade.
    assert apply(service(1), upgraded).update_available is False


@pytest.mark.parametrize("spec", [{"replicas": 5}, {"endpoint": {"port": 8080}}, {"rollout": {"strategy": "replace"}}])
def test_a_change_that_does_not_concern_the_pods_does_not_replace_them_after_an_upgrade(spec: Json) -> None:
    upgraded = apply(service(1), apply(service(1)), image="engine:2")
    scaled = apply(service(2, **spec), upgraded, image="engine:2")
    assert (scaled.engine_image, scaled.update_available) == ("engine:1", True)
    # Also at the next upgrade.
    assert apply(service(2, **spec), scaled, image="engine:3").engine_image == "engine:1"


def test_a_change_that_concerns_the_pods_takes_over_the_newer_rendering() -> None:
    upgraded = apply(service(1), apply(service(1)), image="engine:2")
    changed = apply(service(2, engine={"maxModelLen": 64}), upgraded, image="engine:2")
    assert (changed.engine_image, changed.update_available) == ("engine:2", False)
    assert revision(changed)["metadata"]["name"] != revision(upgraded)["metadata"]["name"]
    assert revision(changed)["revision"] == 2


def test_the_annotation_asks_for_the_newer_rendering_once() -> None:
    upgraded = apply(service(1), apply(service(1)), image="engine:2")
    asked = apply(asking("1"), upgraded, image="engine:2")
    assert (asked.engine_image, asked.update_available) == ("engine:2", False)
    assert apply(asking("1"), asked, image="engine:3").engine_image == "engine:2"
    assert apply(asking("2"), asked, image="engine:3").engine_image == "engine:3"


def test_what_a_deleted_service_of_the_same_name_kept_is_not_taken_over() -> None:
    first = apply(service(1))
    owner = {**revision(first)["metadata"]["ownerReferences"][0], "uid": "of-the-one-before"}
    others = tuple({**each, "metadata": {**each["metadata"], "ownerReferences": [owner]}} for each in first.manifests)
    assert apply(service(1), replace(first, manifests=others), image="engine:2").engine_image == "engine:2"


def test_a_revision_that_was_deleted_is_made_anew_from_the_deployment_and_replaces_no_pod() -> None:
    first = apply(service(1))
    template = revision(first)["data"]["template"]
    again = apply(service(1), first, image="engine:2", forgotten=template)
    assert (again.engine_image, again.update_available) == ("engine:1", True)
    assert revision(again)["metadata"]["name"] == revision(first)["metadata"]["name"]
    # A change of the spec counts all the same.
    changed = apply(service(2, engine={"maxModelLen": 64}), first, image="engine:2", forgotten=template)
    assert (changed.engine_image, changed.update_available) == ("engine:2", False)
