"""kubectl, which knows clusters and credentials and has called us: how cli.py and preview.py ask a cluster."""

import json
import subprocess
from collections.abc import Sequence
from typing import Final

from octavo_operator import names
from octavo_operator.resources import Json, Resource

_DRY_RUN: Final = ("apply", "--filename=-", "--dry-run=server", "--output=json", "--show-managed-fields")


class KubectlFailed(Exception):
    """What kubectl said instead of an answer."""


class Kubectl:
    """A kubectl for one cluster.

    Args:
        context: of the kubeconfig; None: the current one.
        namespace: for objects that name none; None: that of the context.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        self._context = context
        self._options = [
            *([f"--context={context}"] if context is not None else []),
            *([f"--namespace={namespace}"] if namespace is not None else []),
        ]

    def within(self, namespace: str) -> "Kubectl":
        """The same for another namespace."""
        return Kubectl(self._context, namespace)

    def run(self, *arguments: str, document: Json | None = None) -> str:
        """What kubectl prints.

        Raises:
            KubectlFailed: it ended with an error.
            OSError: there is no kubectl.
        """
        text = None if document is None else json.dumps(document)
        command = ["kubectl", *arguments, *self._options]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KubectlFailed(done.stderr.strip())
        return done.stdout

    def get(self, *arguments: str) -> Json:
        """An object, or a list of objects."""
        answer: Json = json.loads(self.run("get", *arguments, "--output=json", "--show-managed-fields"))
        return answer

    def find(self, kind: str, name: str) -> Json | None:
        """An object, or None where there is none."""
        text = self.run("get", kind, name, "--ignore-not-found", "--output=json", "--show-managed-fields")
        return json.loads(text) if text else None

    def labelled(self, resources: Sequence[Resource], selector: str) -> list[Json]:
        """The objects of these kinds that a label selector matches."""
        kinds = ",".join(_full_name(resource) for resource in resources)
        found: list[Json] = self.get(kinds, f"--selector={selector}")["items"]
        return found

    def serves(self, resource: Resource) -> bool:
        """Whether the API server knows the kind."""
        try:
            group = json.loads(self.run("get", f"--raw=/apis/{resource.api_version}"))
        except KubectlFailed:
            return False
        return any(served["name"] == resource.plural for served in group["resources"])

    def would_be(self, document: Json) -> Json:
        """What `kubectl apply` would make of an object: the API server judges and completes it; nothing is stored."""
        answer: Json = json.loads(self.run(*_DRY_RUN, document=document))
        return answer

    def would_be_ours(self, manifest: Json) -> Json:
        """What the operator's server-side apply would make of a child; nothing is stored."""
        manager = f"--field-manager={names.FIELD_MANAGER}"
        answer: Json = json.loads(self.run(*_DRY_RUN, "--server-side", "--force-conflicts", manager, document=manifest))
        return answer


def _full_name(resource: Resource) -> str:
    group, _, _version = resource.api_version.rpartition("/")
    return f"{resource.plural}.{group}" if group else resource.plural
