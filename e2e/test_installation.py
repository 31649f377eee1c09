"""Installing and uninstalling the operator, as Helm does it on a whole cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from octavo_cluster import product
from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image
    from octavo_cluster.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def operator_pods(cluster: Cluster) -> list[dict[str, object]]:
    where = [f"--namespace={product.OPERATOR_NAMESPACE}", "--selector=app.kubernetes.io/component=operator"]
    pods: list[dict[str, object]] = cluster.kubectl.get("pods", *where)["items"]
    return pods


def test_the_operator_runs_where_only_restricted_pods_may_and_never_restarts(operator_installed: Cluster) -> None:
    namespace = operator_installed.kubectl.get("namespace", product.OPERATOR_NAMESPACE)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"

    (pod,) = operator_pods(operator_installed)

    status = json.loads(json.dumps(pod["status"]))
    assert status["phase"] == "Running"
    assert [each["restartCount"] for each in status["containerStatuses"]] == [0]


def test_an_uninstalled_operator_leaves_what_it_made_and_a_new_one_goes_on_with_it(
    namespace: Workspace, product_images: tuple[Image, Image]
) -> None:
    cluster = namespace.cluster
    namespace.apply("kept", replicas=0)
    namespace.await_condition("kept", lambda condition: condition["reason"] == "Suspended", "Suspended")
    before = namespace.get("deployment", "kept")
    assert before is not None

    product.uninstall(cluster)
    try:
        wait_until(
            lambda: "its pod is still there" if operator_pods(cluster) else None, what="helm uninstall", seconds=60
        )
        assert namespace.get("inferenceservice", "kept") is not None  # so the definition is there too
        after = namespace.get("deployment", "kept")
        assert after is not None
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        namespace.kubectl("delete", "service", "kept")
    finally:
        product.install(cluster, *product_images)

    wait_until(lambda: None if namespace.get("service", "kept") else "no Service", what="the new operator", seconds=30)
