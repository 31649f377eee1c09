"""What the containers of a pod have in common, those that pull and the one that serves.

Used by deployment.py and weights.py; pure.
"""

from typing import Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest

TMP_DIR: Final = "/tmp"  # noqa: S108 - a path in the container, where it is a volume of its own
TMP_MOUNT: Final[Manifest] = {"name": "tmp", "mountPath": TMP_DIR}
TERMINATION_LOG: Final = "/dev/termination-log"


def container(name: str, image: str, args: list[str]) -> Manifest:
    """A container that runs the image's entry point, `octavo`."""
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def environment(service: InferenceService, *more: Manifest) -> Manifest:
    """What the user puts into the environment of all containers, and what one has besides."""
    env = [*(variable.to_dict() for variable in service.spec.pod.env), *more]
    return {"env": env} if env else {}


def resources(service: InferenceService, *, gpus: bool) -> Manifest:
    """What a container requests and may have."""
    accelerator, wanted = service.spec.accelerator, service.spec.resources
    limits = wanted.limits.to_dict()
    if gpus and accelerator.count is not None:
        limits[names.GPU_RESOURCE] = str(accelerator.count)
    parts = {"requests": wanted.requests.to_dict(), "limits": limits}
    return {key: value for key, value in parts.items() if value}
