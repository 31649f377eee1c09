"""The kinds of objects that the operator touches, and how one of them is named.

Used by every module that reads or makes objects; imports no client, so that pure modules can use it.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from octavo_operator import names

Json = dict[str, Any]  # an object, or a part of one, as the API server sends it


class Key(NamedTuple):
    """Which InferenceService, or which object of a kind that is known."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Resource:
    """A kind of namespaced object, and where the API server keeps it."""

    api_version: str  # such as apps/v1
    kind: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The path of one object, or of the collection in one namespace or (None) in all."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        parts = [root, f"namespaces/{namespace}" if namespace else None, self.plural, name, subresource]
        return "/".join(part for part in parts if part)


INFERENCE_SERVICE: Final = Resource(names.API_VERSION, names.KIND, names.PLURAL)
DEPLOYMENT: Final = Resource("apps/v1", "Deployment", "deployments")
SERVICE: Final = Resource("v1", "Service", "services")
AUTOSCALER: Final = Resource("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
SERVICE_ACCOUNT: Final = Resource("v1", "ServiceAccount", "serviceaccounts")
DISRUPTION_BUDGET: Final = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICY: Final = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
VOLUME_CLAIM: Final = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
CONFIG_MAP: Final = Resource("v1", "ConfigMap", "configmaps")
CONTROLLER_REVISION: Final = Resource("apps/v1", "ControllerRevision", "controllerrevisions")
POD: Final = Resource("v1", "Pod", "pods")
EVENT: Final = Resource("events.k8s.io/v1", "Event", "events")
LEASE: Final = Resource("coordination.k8s.io/v1", "Lease", "leases")

POD_MONITOR: Final = Resource("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")
SCALED_OBJECT: Final = Resource("keda.sh/v1alpha1", "ScaledObject", "scaledobjects")

OPTIONAL: Final = {resource.kind: resource for resource in (POD_MONITOR, SCALED_OBJECT)}  # that a cluster may lack
CHILDREN: Final = {  # what may be applied
    resource.kind: resource
    for resource in (
        SERVICE_ACCOUNT,
        NETWORK_POLICY,
        VOLUME_CLAIM,
        CONFIG_MAP,
        SERVICE,
        DEPLOYMENT,
        CONTROLLER_REVISION,
        DISRUPTION_BUDGET,
        AUTOSCALER,
        *OPTIONAL.values(),
    )
}
