"""The objects that should exist for an InferenceService, as pure functions: one module per kind.

Called by decide.py and by `kubectl octavo render`. Knows nothing of what exists already, nor of a client.
"""

from collections.abc import Collection

from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import (
    autoscaler,
    deployment,
    disruption_budget,
    monitor,
    network_policy,
    profiles,
    scaled_object,
    service_account,
    volume_claim,
)
from octavo_operator.desired import service as cluster_service
from octavo_operator.desired.metadata import Manifest
from octavo_operator.resources import POD_MONITOR, SCALED_OBJECT


def children(
    service: InferenceService,
    *,
    engine_image: str,
    offered: Collection[str] = (),
    ends_first: bool = False,
    keep_count: bool = False,
    prometheus_url: str | None = None,
) -> tuple[Manifest, ...]:
    """Every child that should exist, complete as the operator applies it. A kind that is missing should not exist.

    They are in the order in which they are applied: what pods need comes before the Deployment
    that makes them, and that, without a number of our own, before an autoscaler.

    Args:
        service: the resource.
        engine_image: the image for services that name none.
        offered: those of resources.OPTIONAL's kinds that the cluster has.
        ends_first: whether an old pod ends before its successor starts; see rollout.py.
        keep_count: whether the number of pods that there are stays, where the spec gives none; see rollout.py.
        prometheus_url: the Prometheus that KEDA can ask, if there is one.
    """
    cache = service.spec.model.cache
    manifests = [
        service_account.build(service),
        network_policy.build(service),
        *([volume_claim.build(service, cache)] if cache is not None and cache.size is not None else []),
        *([profiles.build(service)] if service.spec.profiles else []),
        cluster_service.build(service),
        deployment.build(service, engine_image=engine_image, ends_first=ends_first, keep_count=keep_count),
        disruption_budget.build(service),
    ]
    if POD_MONITOR.kind in offered:
        manifests.append(monitor.build(service))
    if (autoscaling := service.spec.autoscaling) is not None:
        if SCALED_OBJECT.kind in offered and scaled_object.can_measure(autoscaling, prometheus_url):
            manifests.append(scaled_object.build(service, autoscaling, prometheus_url))
        else:
            manifests.append(autoscaler.build(service, autoscaling))
    return tuple(manifests)


__all__ = ["Manifest", "children"]
