"""Whose the fields of an object are, by the API server's own books."""

from typing import Any

import pytest

from octavo_operator.ownership import our_fields, owned_part, owns

Json = dict[str, Any]

LIVE: Json = {
    "replicas": 5,
    "template": {
        "metadata": {"labels": {"app": "a", "mesh": "on"}},
        "spec": {
            "restartPolicy": "Always",
            "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "mesh", "emptyDir": {}}],
            "containers": [
                {
                    "name": "engine",
                    "image": "e",
                    "args": ["serve", "--x=1"],
                    "ports": [{"containerPort": 8000, "protocol": "TCP", "name": "http"}],
                    "terminationMessagePath": "/dev/termination-log",
                },
                {"name": "mesh", "image": "m"},
            ],
        },
    },
}
OURS: Json = {
    "f:template": {
        "f:metadata": {"f:labels": {"f:app": {}}},
        "f:spec": {
            "f:volumes": {'k:{"name":"tmp"}': {".": {}, "f:name": {}, "f:emptyDir": {}}},
            "f:containers": {
                'k:{"name":"engine"}': {
                    ".": {},
                    "f:name": {},
                    "f:image": {},
                    "f:args": {},
                    "f:ports": {
                        'k:{"containerPort":8000,"protocol":"TCP"}': {".": {}, "f:containerPort": {}, "f:name": {}}
                    },
                }
            },
        },
    }
}
APPLIED: Json = {
    "template": {
        "metadata": {"labels": {"app": "a"}},
        "spec": {
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            "containers": [
                {
                    "name": "engine",
                    "image": "e",
                    "args": ["serve", "--x=1"],
                    "ports": [{"containerPort": 8000, "name": "http"}],
                }
            ],
        },
    }
}


def test_what_was_applied_is_what_is_owned_and_the_rest_is_somebody_elses() -> None:
    assert owned_part(OURS, LIVE) == APPLIED
    assert owns(OURS, APPLIED)
    assert not owns(OURS, LIVE)


def test_items_of_a_set_are_owned_one_by_one() -> None:
    owned: Json = {"f:finalizers": {'v:"a"': {}}}
    assert owned_part(owned, {"finalizers": ["a", "b"]}) == {"finalizers": ["a"]}


@pytest.mark.parametrize(
    "entry",
    [
        {"manager": "octavo", "operation": "Update", "fieldsV1": OURS},
        {"manager": "octavo", "operation": "Apply", "subresource": "status", "fieldsV1": OURS},
        {"manager": "kubectl", "operation": "Apply", "fieldsV1": OURS},
    ],
)
def test_only_our_own_apply_counts(entry: Json) -> None:
    assert our_fields({"managedFields": [entry]}) is None
    assert our_fields({"managedFields": [entry, {"manager": "octavo", "operation": "Apply", "fieldsV1": {}}]}) == {}
    assert our_fields({}) is None
