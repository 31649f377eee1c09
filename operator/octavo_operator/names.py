"""The names that Octavo gives to things in a cluster: API group, label keys, child names, images.

Used by every other module of the operator; knows none of them. A value that users, dashboards or selectors rely on is
written here once and does not change within an API version.
"""

from typing import Final

from octavo_operator import __version__

GROUP: Final = "serving.octavo.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "InferenceService"
SINGULAR: Final = "inferenceservice"
PLURAL: Final = "inferenceservices"
SHORT_NAME: Final = "ois"
CATEGORY: Final = "octavo"
CRD_NAME: Final = f"{PLURAL}.{GROUP}"

FIELD_MANAGER: Final = "octavo"  # owner of every field that the operator applies
DEFAULT_ENGINE_IMAGE: Final = f"octavo/engine:{__version__}"  # what render assumes; the operator is told by a flag

SERVICE_LABEL: Final = f"{GROUP}/service"  # its value is the InferenceService's name; on every child and every pod
MANIFEST_HASH_ANNOTATION: Final = f"{GROUP}/manifest-hash"  # on every child: which manifest was applied last
UPDATE_ANNOTATION: Final = f"{GROUP}/update"  # on an InferenceService; another value takes over a newer rendering
NAME_LABEL: Final = "app.kubernetes.io/name"
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"

ENGINE_COMPONENT: Final = "engine"
ENGINE_CONTAINER: Final = "engine"  # runs `octavo serve`
PULL_CONTAINER: Final = "pull"  # init container, runs `octavo pull`
ADAPTER_CONTAINER: Final = "pull-adapter-"  # and its number; init containers, each runs `octavo pull --adapter`
CREDENTIALS_VOLUME: Final = "credentials"  # of the Secret with which a registry is logged in to
HTTP_PORT_NAME: Final = "http"
HTTP_PORT: Final = 8000  # in the pod; the Service's port is spec.endpoint.port

GPU_RESOURCE: Final = "nvidia.com/gpu"
GPU_PRODUCT_LABEL: Final = "nvidia.com/gpu.product"  # set on nodes by NVIDIA's GPU feature discovery

# A pod is named NAME-<pod template hash, up to 10>-<5 random> and has 63 characters as its host name; a longer service
# name would be cut in the names of its pods, and nobody could tell whose they are.
MAX_NAME_LENGTH: Final = 63 - len("-0123456789-01234")


def labels(service: str) -> dict[str, str]:
    """The labels of every child and pod of the InferenceService named `service`."""
    return {
        NAME_LABEL: "octavo",
        INSTANCE_LABEL: service,
        COMPONENT_LABEL: ENGINE_COMPONENT,
        MANAGED_BY_LABEL: "octavo-operator",
        SERVICE_LABEL: service,
    }


def selector(service: str) -> dict[str, str]:
    """The labels by which Deployment and Service find the pods: as few as possible, because they are immutable."""
    return {COMPONENT_LABEL: ENGINE_COMPONENT, SERVICE_LABEL: service}


def selector_text(service: str) -> str:
    """The same selector in the notation of `kubectl get -l` and of the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in selector(service).items())


def deployment(service: str) -> str:
    """The name of the Deployment that runs the engine."""
    return service


def cluster_service(service: str) -> str:
    """The name of the Service in front of the engine."""
    return service


def autoscaler(service: str) -> str:
    """The name of the HorizontalPodAutoscaler."""
    return service


def disruption_budget(service: str) -> str:
    """The name of the PodDisruptionBudget."""
    return service


def network_policy(service: str) -> str:
    """The name of the NetworkPolicy."""
    return service


def volume_claim(service: str) -> str:
    """The name of the PersistentVolumeClaim that keeps the model: one that users are unlikely to have already."""
    return f"{service}-model-cache"


def profiles(service: str) -> str:
    """The name of the ConfigMap with the profiles."""
    return f"{service}-profiles"


def scaled_object(service: str) -> str:
    """The name of KEDA's ScaledObject."""
    return service


def monitor(service: str) -> str:
    """The name of the PodMonitor."""
    return service


def revision(service: str, digest: str) -> str:
    """The name of the ControllerRevision that keeps the pod template with this hash."""
    return f"{service}-{digest}"


def service_account(service: str) -> str:
    """The name of the pods' ServiceAccount: not the service's, because every namespace has a `default` already."""
    return f"{service}-engine"
