"""The ServiceAccount of the pods: an identity of their own that may do nothing. Called by desired.children; pure."""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService) -> Manifest:
    """The manifest of the ServiceAccount. No pod gets its token: a stolen pod says nothing to the API server."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": object_meta(service, names.service_account(service.name)),
        "automountServiceAccountToken": False,
    }
