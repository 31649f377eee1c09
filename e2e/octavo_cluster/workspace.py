"""A namespace of a whole cluster with Octavo installed, and what end-to-end tests do in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from octavo_cluster import model, storage
from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from subprocess import CompletedProcess

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image

Json = dict[str, Any]

READY_SECONDS: Final = 180.0  # a model on two busy cores


@dataclass(frozen=True)
class Workspace:
    """A namespace that enforces `restricted`, and what tests do in it."""

    cluster: Cluster
    name: str
    engine: Image

    def kubectl(self, *arguments: str, document: Json | None = None, check: bool = True) -> CompletedProcess[str]:
        """Run kubectl in this namespace."""
        text = None if document is None else json.dumps(document)
        return self.cluster.kubectl(f"--namespace={self.name}", *arguments, input=text, check=check)

    def apply(self, name: str, **spec: Any) -> None:
        """Apply an InferenceService as its user would."""
        self.apply_all({name: spec})

    def apply_all(self, specs: dict[str, Json]) -> None:
        """Apply several InferenceServices at once, by their names."""
        items = [
            {
                "apiVersion": "serving.octavo.dev/v1alpha1",
                "kind": "InferenceService",
                "metadata": {"name": name},
                "spec": {
                    "model": {"source": f"pvc://models/{model.FILE_NAME}"},
                    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
                    "rollout": {"drainSeconds": 1},
                    **spec,
                },
            }
            for name, spec in specs.items()
        ]
        self.kubectl("apply", "--filename=-", document={"apiVersion": "v1", "kind": "List", "items": items})

    def patch(self, name: str, spec: Json) -> None:
        """Merge a change into the spec of an InferenceService."""
        change = json.dumps({"spec": spec})
        self.kubectl("patch", "inferenceservice", name, "--type=merge", f"--patch={change}")

    def put_model(self, claim: str) -> None:
        """Put the demo model into a claim, which is made if it is not there."""
        self.put_file(claim, model.demo_model(), model.FILE_NAME)

    def put_file(self, claim: str, file: Path, name: str | None = None) -> None:
        """Put a file into a claim, which is made if it is not there; it keeps its name unless another one is given."""
        storage.put_file(
            self.cluster,
            namespace=self.name,
            claim_name=claim,
            source=file,
            remote_name=name or file.name,
            image=self.engine.reference,
        )

    def get(self, kind: str, name: str) -> Json | None:
        """An object, or None."""
        text = self.kubectl("get", kind, name, "--ignore-not-found", "--output=json").stdout
        return json.loads(text) if text else None

    def pods(self, service: str) -> list[Json]:
        """The engine's pods of a service."""
        selector = f"--selector=serving.octavo.dev/service={service}"
        pods: list[Json] = json.loads(self.kubectl("get", "pods", selector, "--output=json").stdout)["items"]
        return pods

    def condition(self, name: str, type_: str = "Ready") -> Json:
        """A condition of an InferenceService, or nothing."""
        status = (self.get("inferenceservice", name) or {}).get("status", {})
        return next((each for each in status.get("conditions", ()) if each["type"] == type_), {})

    def ready_conditions(self) -> dict[str, Json]:
        """The condition Ready of every InferenceService that has one, by its name."""
        services: list[Json] = json.loads(self.kubectl("get", "inferenceservice", "--output=json").stdout)["items"]
        return {
            service["metadata"]["name"]: each
            for service in services
            for each in service.get("status", {}).get("conditions", ())
            if each["type"] == "Ready"
        }

    def await_condition(self, name: str, holds: Callable[[Json], bool], what: str) -> Json:
        """Wait until the Ready condition is such, and return it."""

        def missing() -> str | None:
            condition = self.condition(name)
            return None if condition and holds(condition) else json.dumps(condition)

        wait_until(missing, what=f"{name}: {what}", seconds=READY_SECONDS, poll=0.5)
        return self.condition(name)

    def await_ready(self, name: str) -> None:
        """Wait until the service is Ready."""
        self.await_condition(name, lambda condition: condition["status"] == "True", "Ready")
