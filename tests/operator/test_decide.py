"""What is planned, from plain data. test_reconcile_apiserver.py has the same judged by a real API server."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.decide import FOREIGN_CHILD_SECONDS, Plan, decide
from octavo_operator.desired import children
from octavo_operator.observe import Child, Observed, Owner
from octavo_operator.resources import Key

Json = dict[str, Any]

UID = "11111111-2222-3333-4444-555555555555"
OURS = Owner(kind="InferenceService", name="llama", uid=UID)


def desired(**spec: Any) -> tuple[Json, ...]:
    service = InferenceService.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "llama", "namespace": "models", "uid": UID, "generation": 1},
            "spec": {"model": {"source": "pvc://models/model.gguf"}, **spec},
        }
    )
    return children(service, engine_image="engine:1")


ELASTIC: Json = {"autoscaling": {"maxReplicas": 9}, "resources": {"requests": {"cpu": "1"}}}

LIST_KEYS = {
    "containers": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "ownerReferences": ("uid",),
}
ATOMIC = {"selector", "podSelector", "matchLabels", "nodeSelector", "scaleTargetRef"}


def fields_of(value: Any, name: str = "") -> Json:
    """FieldsV1 of a manifest's part, as the API server writes it down for the kinds in question."""
    if isinstance(value, dict) and value and name not in ATOMIC:
        return {f"f:{key}": fields_of(member, key) for key, member in value.items()}
    if isinstance(value, list) and (name in LIST_KEYS or (name == "ports" and value)):
        keys = LIST_KEYS.get(name) or (("containerPort" if "containerPort" in value[0] else "port"), "protocol")
        return {
            f"k:{json.dumps({key: item.get(key, 'TCP') for key in keys})}": {".": {}, **fields_of(item)}
            for item in value
        }
    return {}


def live(manifest: Json, **changes: Any) -> Child:
    """The child that is there after the manifest was applied."""
    identified = {"name", "namespace", "uid"}
    metadata = {key: value for key, value in manifest["metadata"].items() if key not in identified}
    body = {
        **{key: value for key, value in manifest.items() if key not in {"apiVersion", "kind"}},
        "metadata": metadata,
    }
    child = Child(
        service=Key("models", "llama"),
        kind=manifest["kind"],
        name=manifest["metadata"]["name"],
        uid=f"uid-of-{manifest['kind']}",
        version=7,
        owner=OURS,
        manifest_hash=manifest["metadata"]["annotations"][names.MANIFEST_HASH_ANNOTATION],
        owned_fields=json.dumps(fields_of(body)),
        replicas=manifest.get("spec", {}).get("replicas"),
    )
    return replace(child, **changes)


def observed(*there: Child) -> Observed:
    return Observed(children={(child.kind, child.name): child for child in there})


def first_plan(**spec: Any) -> Plan:
    return decide(UID, desired(**spec), observed())


def after(**spec: Any) -> dict[str, Child]:
    """The children that are there when the service has been reconciled, by kind."""
    return {manifest["kind"]: live(manifest) for manifest in first_plan(**spec).apply}


def test_what_is_missing_is_applied_with_the_autoscaler_last() -> None:
    plan = first_plan(**ELASTIC)
    assert [manifest["kind"] for manifest in plan.apply] == [
        *("ServiceAccount", "NetworkPolicy", "Service", "Deployment"),
        *("PodDisruptionBudget", "HorizontalPodAutoscaler"),
    ]
    assert all("uid" not in manifest["metadata"] for manifest in plan.apply)
    assert (plan.delete, plan.hand_over, plan.conflicts, plan.leaving, plan.requeue_after) == ((), (), (), (), None)


@pytest.mark.parametrize("spec", [{}, {"replicas": 3}, ELASTIC, {"accelerator": {"type": "nvidia", "count": 2}}])
def test_a_second_run_plans_nothing(spec: Json) -> None:
    assert decide(UID, desired(**spec), observed(*after(**spec).values())) == Plan()


def test_values_that_the_server_defaults_or_others_add_make_no_difference() -> None:
    there = after()
    owned = json.loads(there["Deployment"].owned_fields or "")
    more = replace(there["Deployment"], generation=99, status={"replicas": 4}, owned_fields=json.dumps(owned))
    assert decide(UID, desired(), observed(*{**there, "Deployment": more}.values())) == Plan()


def test_a_change_of_the_spec_is_applied_to_that_very_object() -> None:
    plan = decide(UID, desired(engine={"maxModelLen": 64}), observed(*after().values()))
    (manifest,) = plan.apply
    assert (manifest["kind"], manifest["metadata"]["uid"]) == ("Deployment", "uid-of-Deployment")


def without_one(fields: Json) -> Iterator[tuple[str, Json]]:
    """Every fieldsV1 that lacks one member of this one; a node that has lost its last member goes with it."""
    for name, member in fields.items():
        if name == ".":
            continue
        yield name, {other: node for other, node in fields.items() if other != name}
        yield from ((f"{name}/{path}", {**fields, name: rest}) for path, rest in without_one(member) if rest)


@pytest.mark.parametrize("kind", [manifest["kind"] for manifest in first_plan(**ELASTIC).apply])
def test_any_field_that_somebody_takes_from_us_is_applied_again(kind: str) -> None:
    there = after(**ELASTIC)
    losses = [loss for loss in without_one(json.loads(there[kind].owned_fields or "")) if loss[1]]
    assert len(losses) >= 12
    for path, left in losses:
        lost = {**there, kind: replace(there[kind], owned_fields=json.dumps(left))}
        plan = decide(UID, desired(**ELASTIC), observed(*lost.values()))
        assert [manifest["kind"] for manifest in plan.apply] == [kind], path


def test_a_child_whose_books_were_burnt_is_applied_again() -> None:
    there = after()
    burnt = replace(there["Service"], owned_fields=None)
    plan = decide(UID, desired(), observed(*{**there, "Service": burnt}.values()))
    assert [manifest["kind"] for manifest in plan.apply] == ["Service"]


def test_an_item_whose_key_the_server_has_defaulted_is_found() -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "llama", "namespace": "models"},
        "spec": {"ports": [{"port": 80}], "set": ["a"]},
    }
    applied = decide(UID, [manifest], observed()).apply[0]
    owned: Json = {
        "f:metadata": {"f:annotations": {f"f:{names.MANIFEST_HASH_ANNOTATION}": {}}},
        "f:spec": {"f:ports": {'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:port": {}}}, "f:set": {'v:"a"': {}}},
    }
    child = replace(live(applied), owned_fields=json.dumps(owned))
    assert decide(UID, [manifest], observed(child)) == Plan()
    owned["f:spec"]["f:set"] = {'v:"b"': {}}
    assert decide(UID, [manifest], observed(replace(child, owned_fields=json.dumps(owned)))).apply


def test_the_autoscaler_goes_when_autoscaling_is_switched_off_and_the_number_is_the_specs() -> None:
    there = after(**ELASTIC)
    plan = decide(UID, desired(), observed(*(replace(child, replicas=5) for child in there.values())))
    assert [child.kind for child in plan.delete] == ["HorizontalPodAutoscaler"]
    deployment = next(manifest for manifest in plan.apply if manifest["kind"] == "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert plan.hand_over == ()


def test_the_number_of_replicas_is_handed_over_before_we_let_go_of_it() -> None:
    there = after(replicas=5)
    plan = decide(UID, desired(**ELASTIC), observed(*there.values()))
    assert plan.hand_over == (
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "llama", "namespace": "models", "uid": "uid-of-Deployment"},
            "spec": {"replicas": 5},
        },
    )
    assert [manifest["kind"] for manifest in plan.apply] == ["Deployment", "HorizontalPodAutoscaler"]
    assert "replicas" not in plan.apply[0]["spec"]


def test_a_number_that_is_not_ours_is_not_handed_over() -> None:
    there = after(**ELASTIC)
    scaled = {**there, "Deployment": replace(there["Deployment"], replicas=5)}
    plan = decide(UID, desired(**ELASTIC, engine={"maxModelLen": 64}), observed(*scaled.values()))
    assert [manifest["kind"] for manifest in plan.apply] == ["Deployment"]
    assert plan.hand_over == ()


@pytest.mark.parametrize("owner", [None, Owner(kind="Helm", name="llama", uid="x")])
def test_an_object_of_another_owner_is_a_conflict_and_looked_at_again(owner: Owner | None) -> None:
    there = after()
    foreign = replace(there["Service"], owner=owner)
    plan = decide(UID, desired(), observed(*{**there, "Service": foreign}.values()))
    assert plan == Plan(conflicts=(foreign,), requeue_after=FOREIGN_CHILD_SECONDS)


def test_a_foreign_object_with_our_label_but_no_name_of_ours_is_left_alone() -> None:
    there = after()
    foreign = replace(there["Service"], name="other", owner=None)
    assert decide(UID, desired(), observed(*there.values(), foreign)) == Plan()


def test_a_child_of_a_deleted_service_of_the_same_name_is_waited_for() -> None:
    there = after()
    old = replace(there["Service"], owner=replace(OURS, uid="of-the-one-before"))
    assert decide(UID, desired(), observed(*{**there, "Service": old}.values())) == Plan(leaving=(old,))


def test_a_child_that_is_being_deleted_is_waited_for_and_not_deleted_twice() -> None:
    there = after(**ELASTIC)
    leaving = {kind: replace(child, deleting=True) for kind, child in there.items()}
    plan = decide(UID, desired(), observed(*leaving.values()))
    assert plan == Plan(leaving=tuple(leaving[manifest["kind"]] for manifest in desired()))
