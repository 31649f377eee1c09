"""The objects that should exist for an InferenceService, as pure functions: one module per kind.

Called by decide.py and by `kubectl octavo render`. Knows nothing of what exists already, nor of a client.
"""

from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import autoscaler, deployment, disruption_budget, network_policy, service_account
from octavo_operator.desired import service as cluster_service
from octavo_operator.desired.metadata import Manifest


def children(service: InferenceService, *, engine_image: str) -> tuple[Manifest, ...]:
    """Every child that should exist, complete as the operator applies it. A kind that is missing should not exist.

    They are in the order in which they are applied: what pods need comes before the Deployment that makes them.

    Args:
        service: the resource.
        engine_image: the image for services that name none.
    """
    manifests = [
        service_account.build(service),
        network_policy.build(service),
        cluster_service.build(service),
        deployment.build(service, engine_image=engine_image),
        disruption_budget.build(service),
    ]
    if service.spec.autoscaling is not None:
        manifests.append(autoscaler.build(service, service.spec.autoscaling))
    return tuple(manifests)


__all__ = ["Manifest", "children"]
