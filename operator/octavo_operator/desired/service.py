"""The Service in front of the engine's pods, and the URL that follows from it. Called by desired.children; pure."""

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta


def build(service: InferenceService) -> Manifest:
    """The manifest of the Service."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": object_meta(service, names.cluster_service(service.name)),
        "spec": {
            "type": "ClusterIP",
            "selector": names.selector(service.name),
            "ports": [
                {
                    "name": names.HTTP_PORT_NAME,
                    "port": service.spec.endpoint.port,
                    "targetPort": names.HTTP_PORT_NAME,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
        },
    }


def url(service: InferenceService) -> str:
    """The base URL of the OpenAI API inside the cluster; works whatever the cluster's domain is called."""
    host = f"{names.cluster_service(service.name)}.{service.metadata.namespace or 'default'}.svc"
    port = service.spec.endpoint.port
    return f"http://{host}/v1" if port == 80 else f"http://{host}:{port}/v1"
