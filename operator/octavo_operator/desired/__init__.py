"""The objects that should exist for an InferenceService, as pure functions: one module per kind.

Called by decide.py and by `kubectl octavo render`. Knows nothing of what exists already, nor of a client.
"""

from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import autoscaler, deployment
from octavo_operator.desired import service as cluster_service
from octavo_operator.desired.metadata import Manifest


def children(service: InferenceService, *, engine_image: str) -> tuple[Manifest, ...]:
    """Every child that should exist, complete as the operator applies it. A kind that is missing should not exist.

    Args:
        service: the resource.
        engine_image: the image for services that name none.
    """
    manifests = [cluster_service.build(service), deployment.build(service, engine_image=engine_image)]
    if service.spec.autoscaling is not None:
        manifests.append(autoscaler.build(service, service.spec.autoscaling))
    return tuple(manifests)


__all__ = ["Manifest", "children"]
