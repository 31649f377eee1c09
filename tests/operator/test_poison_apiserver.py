"""Stored services that cannot be acted on, among fifty that can: they say why, and cost the others nothing."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from octavo_cluster.playground import Playground, eventually
from octavo_cluster.shell import wait_until
from octavo_operator import names

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]

Json = dict[str, Any]

GOOD: Final = [f"good-{number:02}" for number in range(50)]
SOURCE: Final = {"model": {"source": "pvc://models/model.gguf"}}
# What an older or a hand-made CRD would have let pass: the spec, and what its status says.
POISON: Final[dict[str, tuple[Json, str]]] = {
    "old-source": ({"model": {"source": "ftp://host/model.gguf"}}, "spec.model.source: must start with pvc://"),
    "no-model": ({}, "spec.model: Field required"),
    "text-for-number": (
        {**SOURCE, "endpoint": {"port": "http"}},
        "spec.endpoint.port: Input should be a valid integer",
    ),
    "list-for-object": ({**SOURCE, "engine": ["--port=1"]}, "spec.engine: Input should be"),
    "deep": ({**SOURCE, "engine": {"extraArgs": [[["--seed=1"]]]}}, "spec.engine.extraArgs[0]: Input should be"),
    "own-profile": ({**SOURCE, "profiles": [{"name": "own-profile"}]}, "spec.profiles must not have the name"),
}


@contextmanager
def laxer_crd(playground: Playground) -> Iterator[None]:
    """The API server takes any spec, until the end of the block."""
    kubectl = playground.server.kubectl
    crd = kubectl.get("crd", names.CRD_NAME)
    strict = {**crd, "metadata": {"name": crd["metadata"]["name"]}}
    lax = json.loads(json.dumps(strict))
    root = lax["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    del root["x-kubernetes-validations"]
    root["properties"]["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    kubectl("replace", "--filename=-", input=json.dumps(lax))
    try:
        yield
    finally:
        kubectl("replace", "--filename=-", input=json.dumps(strict))


def documents(specs: dict[str, Json]) -> Json:
    items = [
        {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}
        for name, spec in specs.items()
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def refusal(playground: Playground, document: Json) -> str | None:
    """Apply the document; what the API server has against it, if anything."""
    answer = playground.server.kubectl(
        f"--namespace={playground.namespace}", "apply", "--filename=-", input=json.dumps(document), check=False
    )
    return answer.stderr or None


def change_all(playground: Playground, port: int) -> tuple[Counter[str], float]:
    """Change every good service; the operator's writes by kind, and the seconds until all had arrived."""
    written, began = len(playground.audit()), time.monotonic()
    for name in GOOD:
        playground.patch("ois", {"spec": {"endpoint": {"port": port}}}, name)
    waiting = set(GOOD)

    def arrived() -> bool:
        for name in sorted(waiting):
            status = playground.there("ois", name)["status"]
            if playground.there("service", name)["spec"]["ports"][0]["port"] != port or str(port) not in status["url"]:
                return False
            waiting.discard(name)
        return True

    eventually(arrived, f"port {port} everywhere", lambda: f"{len(waiting)} wait", seconds=60)
    seconds = time.monotonic() - began
    kinds = Counter(line["objectRef"]["resource"] for line in playground.audit()[written:])
    return kinds, seconds


def test_services_that_cannot_be_acted_on_say_why_and_cost_fifty_others_nothing(playground: Playground) -> None:
    with playground.operator() as operator:
        playground.kubectl("apply", "--filename=-", document=documents(dict.fromkeys(GOOD, SOURCE)))
        eventually(
            lambda: all(playground.condition(name=name).get("reason") == "Starting" for name in GOOD),
            "fifty services",
            seconds=60,
        )
        operator.rest(reconciles=len(GOOD))
        before, seconds_before = change_all(playground, 8001)
        with laxer_crd(playground):
            poisoned = documents({name: spec for name, (spec, _) in POISON.items()})
            wait_until(lambda: refusal(playground, poisoned), what="the laxer CRD", seconds=60)
        for name, (_, says) in POISON.items():
            told = playground.await_ready("False", "InvalidSpec", name)
            assert says in told["message"]
        operator.rest(reconciles=len(GOOD))
        after, seconds_after = change_all(playground, 8002)
        assert after == before  # not a write more
        # Each is looked at when it comes, when its status is written and when the CRD changes, and not again and again.
        assert operator.metric('octavo_reconciles_total{result="invalid"}') <= 5 * len(POISON)
        assert operator.metric('octavo_reconciles_total{result="fault"}') == 0
        assert all(playground.get("deployment", name) is None for name in POISON)
    print(f"fifty changes: {seconds_before:.1f} s, with {len(POISON)} poisoned services {seconds_after:.1f} s")  # noqa: T201 - the measurement
