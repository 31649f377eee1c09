"""kubectl, bound to one cluster: what every backend and the API server alone offer to tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo_cluster import shell

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path


KUBECTL_CACHE = "kubectl-cache"


@dataclass(frozen=True, slots=True)
class Kubectl:
    """A kubectl that knows its cluster; call it with kubectl's own arguments."""

    program: Path
    kubeconfig: Path

    def __call__(
        self,
        *arguments: str,
        input: str | None = None,  # noqa: A002 - subprocess.run's own name for it
        check: bool = True,
        timeout: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl.

        Args:
            arguments: as on the command line.
            input: what kubectl reads on stdin, such as manifests for `apply -f -`.
            check: whether an error raises.
            timeout: seconds after which kubectl is killed.

        Raises:
            CommandFailed: kubectl ended with an error (and `check`); the message holds what it printed.
        """
        return shell.run(self.command(*arguments), stdin=input, check=check, timeout=timeout)

    def command(self, *arguments: str) -> list[str]:
        """The command line of a kubectl that the caller runs by itself."""
        # A cache of its own beside the kubeconfig: the next cluster at this address has other resources.
        cache = self.kubeconfig.parent / KUBECTL_CACHE
        return [str(self.program), f"--kubeconfig={self.kubeconfig}", f"--cache-dir={cache}", *arguments]

    def get(self, *arguments: str) -> dict[str, Any]:
        """What `kubectl get ... -o json` prints."""
        document: dict[str, Any] = json.loads(self("get", *arguments, "--output=json").stdout)
        return document

    def apply(self, *documents: dict[str, Any], namespace: str | None = None) -> None:
        """Apply manifests by server-side apply."""
        where = [f"--namespace={namespace}"] if namespace else []
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
        self("apply", "--server-side", *where, "--filename=-", input=text)
