"""Octavo on a cluster: installing the operator, and a namespace for models. For the demo and the fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo_cluster import binaries, paths, shell

if TYPE_CHECKING:
    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image

RELEASE = "octavo"
OPERATOR_NAMESPACE = "octavo-system"
OPERATOR = f"deployment/{RELEASE}-operator"
CHART = paths.PROJECT / "helm" / "octavo"


def make_namespace(cluster: Cluster, name: str) -> None:
    """Make a namespace in which Kubernetes refuses every pod that is not `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    cluster.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})


def helm(cluster: Cluster, *arguments: str) -> str:
    """Run helm in the operator's namespace; returns what it printed."""
    options = [f"--kubeconfig={cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}"]
    return shell.run([binaries.folder() / "helm", *arguments, *options]).stdout


def is_installed(cluster: Cluster) -> bool:
    """Whether the release is there."""
    return RELEASE in helm(cluster, "list", "--short").split()


def install(cluster: Cluster, operator: Image, engine: Image) -> None:
    """Install the operator from the chart, or upgrade it, and wait until it runs."""
    make_namespace(cluster, OPERATOR_NAMESPACE)
    values = {
        "image.repository": operator.repository,
        "image.tag": operator.tag,
        "engine.image.repository": engine.repository,
        "engine.image.tag": engine.tag,
    }
    settings = [f"--set-string={name}={value}" for name, value in values.items()]
    helm(cluster, "upgrade", "--install", RELEASE, str(CHART), *settings, "--wait", "--timeout=3m")


def uninstall(cluster: Cluster) -> None:
    """Uninstall the operator; the resource definition stays, and with it every InferenceService."""
    helm(cluster, "uninstall", RELEASE, "--wait", "--timeout=2m")
