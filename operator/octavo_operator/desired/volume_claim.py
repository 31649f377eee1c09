"""The PersistentVolumeClaim that keeps a pulled model, so that a new pod need not pull it. Called by desired.children.

Pure. The claim goes with its service, and when spec.model.cache goes: what is in it can be pulled again.
"""

from octavo_operator import names
from octavo_operator.api.model import CacheSpec
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService, cache: CacheSpec) -> Manifest:
    """The manifest of the claim, for a cache that has a size and so is not somebody else's claim."""
    storage_class = {"storageClassName": cache.storage_class_name} if cache.storage_class_name is not None else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": object_meta(service, names.volume_claim(service.name)),
        "spec": {
            "accessModes": [cache.access_mode or "ReadWriteOnce"],
            **storage_class,
            "resources": {"requests": {"storage": cache.size}},
        },
    }
