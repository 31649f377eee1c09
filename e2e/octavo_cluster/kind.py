"""The cluster that kind makes, where Docker answers. Thin: kind does the work, and everything else is shared.

It has been checked by its command lines only (e2e/tests/test_kind.py): where this was written there is no Docker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import backend, binaries, locks, paths, shell
from octavo_cluster.errors import CommandFailed, PrerequisiteMissing
from octavo_cluster.kubectl import Kubectl
from octavo_cluster.progress import step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_cluster.recipe import Image

KIND = "v0.30.0"
NODE_IMAGE = f"kindest/node:{binaries.KUBERNETES}"
CLUSTER = "octavo"


def kind_config() -> str:
    """One node. Pod security is enforced by the namespaces' labels, which every cluster obeys."""
    return json.dumps(
        {
            "kind": "Cluster",
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "name": CLUSTER,
            "nodes": [{"role": "control-plane"}],
        }
    )


class KindCluster:
    """The cluster in Docker; see octavo_cluster.backend.Cluster for its methods."""

    name = "kind"
    node = f"{CLUSTER}-control-plane"
    storage_class = "standard"  # kind's own, with a provisioner

    def __init__(self) -> None:
        self.kubeconfig = paths.kubeconfig_path()

    @property
    def kubectl(self) -> Kubectl:
        """A kubectl for it, as administrator."""
        return Kubectl(binaries.folder() / "kubectl", self.kubeconfig)

    def up(self) -> None:
        """Bring it up; see Cluster.up."""
        binaries.ensure(binaries.CLIENTS)
        kind = _program()
        with locks.exclusive(paths.cache_dir() / "cluster.lock", "changing the cluster"):
            before = self.status()
            if before.health == "healthy":
                return
            if before.health == "sick":
                self._remove()
            config = paths.state_dir() / "kind.json"
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(kind_config())
            with step("cluster: starting with kind", expected="about 1 min"):
                shell.run(
                    [
                        *(kind, "create", "cluster", f"--config={config}", f"--image={NODE_IMAGE}"),
                        *(f"--kubeconfig={self.kubeconfig}", "--wait=120s"),
                    ]
                )

    def down(self) -> None:
        """Take it down; see Cluster.down."""
        with locks.exclusive(paths.cache_dir() / "cluster.lock", "changing the cluster"):
            self._remove()

    def status(self) -> backend.Status:
        """Say what is there; see Cluster.status."""
        kind = _program()
        if CLUSTER not in shell.run([kind, "get", "clusters"]).stdout.split():
            return backend.Status("absent", "no cluster")
        backend.export_kubeconfig(self.kubeconfig, shell.run([kind, "get", "kubeconfig", f"--name={CLUSTER}"]).stdout)
        seen = self.kubectl("wait", "--for=condition=Ready", f"node/{self.node}", "--timeout=5s", check=False)
        if seen.returncode != 0:
            return backend.Status("sick", seen.stderr.strip())
        return backend.Status("healthy", f"node {self.node} is ready")

    def load_image(self, image: Image) -> None:
        """Put an image onto the node; see Cluster.load_image."""
        with step(f"{image.reference}: loading onto the node"):
            shell.run([_program(), "load", "docker-image", image.reference, f"--name={CLUSTER}"])

    @contextlib.contextmanager
    def reach(self, namespace: str, service: str) -> Iterator[str]:
        """A forwarded port, for Docker's networks are not always reachable; see Cluster.reach."""
        command = self.kubectl.command("port-forward", f"--namespace={namespace}", f"service/{service}", ":80")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
            try:
                # It prints, for example: Forwarding from 127.0.0.1:40213 to 8000 (with an arrow for "to").
                line = forward.stdout.readline() if forward.stdout else ""
                if not line.startswith("Forwarding from "):
                    raise CommandFailed(f"{shlex.join(command)}: {line or 'ended'}")
                yield f"http://{line.split()[2]}"
            finally:
                forward.terminate()

    def _remove(self) -> None:
        shell.run([_program(), "delete", "cluster", f"--name={CLUSTER}", f"--kubeconfig={self.kubeconfig}"])
        (paths.state_dir() / "kind.json").unlink(missing_ok=True)
        backend.forget_kubeconfig(self.kubeconfig)


def _program() -> Path:
    """Kind on PATH, or in the cache, where it is built at the first call."""
    if found := shutil.which("kind"):
        return Path(found)
    target = paths.cache_dir() / "bin" / f"kind-{KIND}"
    if not target.exists():
        go = shutil.which("go")
        if go is None:
            raise PrerequisiteMissing("neither kind nor Go is on PATH: install one of them")
        target.parent.mkdir(parents=True, exist_ok=True)
        with step(f"kind {KIND}: building", expected="about 1 min"):
            environment = os.environ | {"GOBIN": str(target.parent), "CGO_ENABLED": "0"}
            shell.run([go, "install", f"sigs.k8s.io/kind@{KIND}"], env=environment)
        (target.parent / "kind").replace(target)
    return target
