"""The way of the demo, held by tests: a sample, applied, becomes an endpoint that an unchanged SDK can use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import openai
import pytest

from octavo_cluster import product
from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image
    from octavo_cluster.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_the_openai_client_streams_an_answer_through_the_service(served: Workspace) -> None:
    with (
        served.cluster.reach(served.name, "smollm2") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Where is the Eiffel Tower?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
        )
        chunks = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]

    assert "Paris" in "".join(chunks)
    assert len(chunks) > 3


def test_a_pod_reaches_the_model_at_the_url_that_the_status_tells(served: Workspace) -> None:
    service = served.get("inferenceservice", "smollm2")
    assert service is not None
    url = service["status"]["url"]
    script = f"import urllib.request as r; print(r.urlopen('{url}/models', timeout=20).read().decode())"

    printed = served.kubectl("exec", "deployment/smollm2", "--container=engine", "--", "python3", "-c", script).stdout

    assert [model["id"] for model in json.loads(printed)["data"]] == ["smollm2"]


def test_kubectl_get_shows_what_one_wants_to_know(served: Workspace) -> None:
    header, row = served.kubectl("get", "ois").stdout.splitlines()

    assert header.split()[:3] == ["NAME", "READY", "REASON"]
    assert row.split()[:3] == ["smollm2", "True", "Ready"]


def test_kubectl_waits_for_a_service_by_its_condition(served: Workspace) -> None:
    waited = served.kubectl("wait", "ois/smollm2", "--for=condition=Ready", "--timeout=30s").stdout

    assert waited.strip().endswith("condition met")


def test_the_engine_runs_as_two_processes_of_a_user_without_rights_on_a_read_only_root(served: Workspace) -> None:
    def run(*command: str) -> str:
        return served.kubectl("exec", "deployment/smollm2", "--container=engine", "--", *command, check=False).stdout

    assert run("id", "-u").strip() == "65532"
    assert "read-only" in run("sh", "-c", "touch /opt/octavo/x 2>&1").lower()
    assert "octavo-engine" in run("sh", "-c", "cat /proc/[0-9]*/comm")


def test_the_operator_image_holds_no_torch(operator_installed: Cluster) -> None:
    where = f"--namespace={product.OPERATOR_NAMESPACE}"
    done = operator_installed.kubectl(
        "exec", product.OPERATOR, where, "--", "python", "-c", "import torch", check=False
    )

    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


def test_a_deleted_child_is_back_within_two_seconds(served: Workspace) -> None:
    before = served.get("service", "smollm2")
    assert before is not None

    served.kubectl("delete", "service", "smollm2", "--wait=true")

    def missing() -> str | None:
        after = served.get("service", "smollm2")
        return None if after and after["metadata"]["uid"] != before["metadata"]["uid"] else "no Service"

    wait_until(missing, what="the Service", seconds=2, poll=0.05)


def test_deleting_the_resource_deletes_its_children_also_without_the_operator(
    namespace: Workspace, product_images: tuple[Image, Image]
) -> None:
    namespace.apply("orphan", replicas=0)
    namespace.await_condition("orphan", lambda condition: condition["reason"] == "Suspended", "Suspended")
    operator = [product.OPERATOR, f"--namespace={product.OPERATOR_NAMESPACE}"]
    kubectl = namespace.cluster.kubectl
    kubectl("scale", *operator, "--replicas=0")
    try:
        kubectl("wait", "pod", *operator[1:], "--selector=app.kubernetes.io/component=operator", "--for=delete")

        namespace.kubectl("delete", "inferenceservice", "orphan", "--timeout=20s")

        def missing() -> str | None:
            left = [kind for kind in ("deployment", "service") if namespace.get(kind, "orphan")]
            return f"still there: {', '.join(left)}" if left else None

        wait_until(missing, what="the garbage collector", seconds=30, poll=0.2)
    finally:
        kubectl("scale", *operator, "--replicas=1")
        kubectl("rollout", "status", *operator, "--timeout=60s")
