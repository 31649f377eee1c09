"""The ConfigMap with spec.profiles, as the engine's `--profiles` reads it. Called by desired.children; pure.

It is mounted into the pods, and the engine reads it again when the kubelet renews it there (within about a minute): so
a profile changes without a new pod.
"""

from typing import Final

from octavo_operator import names, yaml_text
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta

FILE_NAME: Final = "profiles.yaml"


def build(service: InferenceService) -> Manifest:
    """The manifest of the ConfigMap, for services that have profiles."""
    listed = [profile.as_engine_reads_it() for profile in service.spec.profiles]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": object_meta(service, names.profiles(service.name)),
        "data": {FILE_NAME: yaml_text.dump([listed])},
    }
