"""What keeps a service from serving: the status names it and the way out, and it clears when it is mended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from octavo_cluster import storage

if TYPE_CHECKING:
    from octavo_cluster.workspace import Workspace
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def has_reason(reason: str) -> Any:
    return lambda condition: condition["status"] == "False" and condition["reason"] == reason


def test_a_claim_that_is_not_there_is_named_and_its_arrival_is_enough(namespace: Workspace) -> None:
    namespace.apply("late")

    condition = namespace.await_condition("late", has_reason("ModelSourceNotFound"), "ModelSourceNotFound")
    assert 'PersistentVolumeClaim "models" does not exist' in condition["message"]
    assert "create it, or correct spec.model.source" in condition["message"]

    namespace.put_model("models")
    namespace.await_ready("late")


def test_a_file_that_is_not_in_the_claim_is_told_by_the_engine_and_its_arrival_is_enough(namespace: Workspace) -> None:
    namespace.kubectl("apply", "--filename=-", document=storage.claim("models", namespace.cluster.storage_class))
    namespace.apply("empty")

    condition = namespace.await_condition("empty", has_reason("ModelNotFound"), "ModelNotFound")
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in condition["message"]

    namespace.put_model("models")
    namespace.await_ready("empty")


def test_gpus_decide_limits_and_tensor_parallel_size_and_the_engine_says_what_it_cannot_do(
    namespace: Workspace,
) -> None:
    storage.pretend_gpus(namespace.cluster, 8)
    namespace.put_model("models")
    product = "NVIDIA-H100-80GB-HBM3"
    namespace.apply("one", accelerator={"type": "nvidia", "count": 1, "product": product})
    namespace.apply("two", accelerator={"type": "nvidia", "count": 2, "product": product})

    # The pods are scheduled, but the GPUs are only claimed to be there.
    condition = namespace.await_condition("one", has_reason("DeviceMissing"), "DeviceMissing")
    assert "--device cuda" in condition["message"]
    condition = namespace.await_condition("two", has_reason("TensorParallelInvalid"), "TensorParallelInvalid")
    assert "use --tensor-parallel-size 1 or 3" in condition["message"]

    (pod,) = namespace.pods("two")
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "--tensor-parallel-size=2" in container["args"]
    service = namespace.get("inferenceservice", "two")
    assert service is not None
    assert service["status"]["tensorParallelSize"] == 2


def test_more_gpus_than_there_are_is_unschedulable_with_the_count(namespace: Workspace) -> None:
    storage.pretend_gpus(namespace.cluster, 8)
    namespace.put_model("models")
    namespace.apply("greedy", accelerator={"type": "nvidia", "count": 16})

    condition = namespace.await_condition("greedy", has_reason("Unschedulable"), "Unschedulable")

    assert "nvidia.com/gpu" in condition["message"]


def test_autoscaling_makes_an_autoscaler_that_owns_the_replicas(namespace: Workspace) -> None:
    namespace.put_model("models")
    namespace.apply("elastic", autoscaling={"minReplicas": 1, "maxReplicas": 3})
    namespace.await_ready("elastic")

    autoscaler = namespace.get("horizontalpodautoscaler", "elastic")
    assert autoscaler is not None
    assert autoscaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "elastic"}
    assert (autoscaler["spec"]["minReplicas"], autoscaler["spec"]["maxReplicas"]) == (1, 3)
