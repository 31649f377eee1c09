"""What the metadata of every child has in common. Used by the builders of this package; pure."""

from typing import Any, TypeAlias

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService

Manifest: TypeAlias = dict[str, Any]  # a Kubernetes object, or a part of one, as JSON has it


def object_meta(service: InferenceService, name: str) -> Manifest:
    """The metadata of a child called `name`: labels, and the owner by which the garbage collector finds it.

    A service that is not in a cluster (`kubectl octavo render`) has no uid and so cannot own anything.
    """
    metadata: Manifest = {"name": name}
    if service.metadata.namespace is not None:
        metadata["namespace"] = service.metadata.namespace
    metadata["labels"] = names.labels(service.name)
    if service.metadata.uid is not None:
        metadata["ownerReferences"] = [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": service.name,
                "uid": service.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    return metadata
