"""The cluster's programs, compiled from Go modules into the cache: Kubernetes, etcd, CoreDNS, Helm, pause.

e2e/tools/go.mod pins all of them to one set of Kubernetes libraries, so that they compile once. The folder in the cache
is named after a hash of the sources, so that a change of version never meets old programs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_cluster import locks, paths, shell
from octavo_cluster.errors import PrerequisiteMissing
from octavo_cluster.progress import say, step

if TYPE_CHECKING:
    from collections.abc import Iterable

KUBERNETES = "v1.34.4"

PACKAGES = {
    "coredns": "./coredns",
    "etcd": "go.etcd.io/etcd/server/v3",
    "helm": "helm.sh/helm/v3/cmd/helm",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "pause": "./pause",
}
_NAMED_BY_GO = {"etcd": "server"}  # `go install` names a program after the last part of its path

CLIENTS = ("kubectl", "helm")
API_SERVER = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
WHOLE_CLUSTER = tuple(PACKAGES)

KEPT_GENERATIONS = 2  # folders of programs in the cache, 600 MB each


def sources_hash(tools: Path = paths.TOOLS) -> str:
    """A short hash of everything that the programs are compiled from."""
    digest = hashlib.sha256()
    for file in (tools / "go.mod", tools / "go.sum", *sorted(tools.glob("*/*.go"))):
        digest.update(f"{file.relative_to(tools)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def folder() -> Path:
    """Where the programs of this checkout are once they are built."""
    return paths.cache_dir() / "bin" / sources_hash()


def ensure(names: Iterable[str]) -> Path:
    """Build those of the named programs that are not in the cache yet.

    Returns:
        The folder that holds them.

    Raises:
        PrerequisiteMissing: something must be built and there is no Go.
        CommandFailed: the build failed.
    """
    home = folder()
    with locks.exclusive(paths.cache_dir() / "bin.lock", "building the Go tools"):
        missing = [name for name in sorted(set(names)) if not (home / name).is_file()]
        if missing:
            _build(missing, home)
        home.touch()  # the time of last use, by which older generations are dropped
        _drop_older(home.parent)
    return home


def ensure_for_api_server() -> dict[str, Path]:
    """The programs of an API server without nodes: those in $KUBEBUILDER_ASSETS first, the others from the cache."""
    found: dict[str, Path] = {}
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        found = {name: Path(assets) / name for name in API_SERVER if (Path(assets) / name).is_file()}
        if not {"etcd", "kube-apiserver"} <= found.keys():
            raise PrerequisiteMissing(
                f"KUBEBUILDER_ASSETS={assets} does not hold etcd and kube-apiserver: correct it or unset it"
            )
    if others := set(API_SERVER) - found.keys():
        home = ensure(others)
        found |= {name: home / name for name in others}
    return found


def _build(names: list[str], home: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise PrerequisiteMissing("Go is not on PATH: install Go 1.24 or newer (https://go.dev/dl)")
    home.mkdir(parents=True, exist_ok=True)
    log = paths.cache_dir() / "logs" / "go-install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as temporary:
        out = Path(temporary)

        def built() -> str:
            return f"{len(list(out.iterdir()))} of {len(names)} programs linked"

        title = f"Go tools: building {', '.join(names) if len(names) <= len(API_SERVER) else f'{len(names)} programs'}"
        with step(title, expected=_expected(names), detail=built):
            # Images are built beside it, which mostly wait for networks: they go first.
            shell.run_logged(
                ["nice", go, "install", "-trimpath", f"-ldflags={_ldflags()}", *(PACKAGES[name] for name in names)],
                log,
                env=os.environ | {"GOBIN": str(out), "CGO_ENABLED": "0"},
                cwd=paths.TOOLS,
            )
        for name in names:
            (out / _NAMED_BY_GO.get(name, name)).replace(home / name)  # atomic: what is there is whole


def _expected(names: list[str]) -> str:
    return "6 to 10 min on 2 cores, 1 min where Go's cache is warm" if len(names) > len(API_SERVER) else "a few minutes"


def _ldflags() -> str:
    major, minor, _ = KUBERNETES.removeprefix("v").split(".")
    version = {
        "k8s.io/component-base/version.gitVersion": KUBERNETES,
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": KUBERNETES,
    }
    return " ".join(["-s", "-w", *(f"-X {variable}={value}" for variable, value in version.items())])


def _drop_older(parent: Path) -> None:
    generations = [entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    generations.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for old in generations[KEPT_GENERATIONS:]:
        say(f"    dropping old programs: {old}")
        shutil.rmtree(old)
