"""The life of the operator's chart beside a service that answers: upgraded, rolled back, uninstalled, installed again.

Streams run all the while, one after the other in each of two clients, so that at every moment some are in flight.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from octavo_cluster import product
from octavo_cluster.load import Load
from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from octavo_cluster.recipe import Image
    from octavo_cluster.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Json = dict[str, Any]

CLIENTS: Final = 2
ANSWER_TOKENS: Final = 400  # some seconds


def await_update(where: Workspace, *, available: bool) -> None:
    """Wait until the operator says whether it would make the pods otherwise."""
    wanted = str(available)

    def missing() -> str | None:
        condition = where.condition("living", "UpdateAvailable")
        return None if condition.get("status") == wanted else json.dumps(condition)

    wait_until(missing, what=f"UpdateAvailable={wanted}", seconds=60, poll=0.5)


def await_strategy(where: Workspace) -> None:
    """Wait until the operator has seen the strategy that the spec asks for now."""

    def missing() -> str | None:
        told = (where.get("inferenceservice", "living") or {})["status"]["rollout"]["message"]
        return None if told == "rollout.strategy is surge" else told

    wait_until(missing, what="the new operator", seconds=60, poll=0.5)


def serving(where: Workspace) -> Json:
    """Which pod serves, and of what it was made."""
    (pod,) = where.pods("living")
    (container,) = pod["status"]["containerStatuses"]
    deployment = where.get("deployment", "living")
    assert deployment is not None
    return {
        "pod": pod["metadata"]["uid"],
        "restarts": container["restartCount"],
        "generation": deployment["metadata"]["generation"],
    }


def test_no_stream_notices_that_the_operator_is_upgraded_rolled_back_uninstalled_and_installed(
    namespace: Workspace, product_images: tuple[Image, Image]
) -> None:
    cluster = namespace.cluster
    namespace.put_model("models")
    namespace.apply("living")
    namespace.await_ready("living")
    before = serving(namespace)
    with cluster.reach(namespace.name, "living") as url:
        load = Load(f"{url}/v1", "living", num_tokens=ANSWER_TOKENS)
        with load.of(CLIENTS):
            assert load.begun.wait(60)
            try:
                # An image that is nowhere: a pod that were made of it would not start.
                values = ("--reuse-values", "--set-string=engine.image.tag=next", "--set-string=log.level=debug")
                product.helm(cluster, "upgrade", product.RELEASE, str(product.CHART), *values, "--wait", "--timeout=3m")
                await_update(namespace, available=True)
                product.helm(cluster, "rollback", product.RELEASE, "--wait", "--timeout=3m")
                await_update(namespace, available=False)
                product.uninstall(cluster)
            finally:
                product.install(cluster, *product_images)
            namespace.patch("living", {"rollout": {"strategy": "surge"}})
            await_strategy(namespace)
    assert load.failures == []
    assert load.answers >= CLIENTS
    assert serving(namespace) == before
