"""manifests/install and manifests/monitoring are the chart's objects, for people without Helm."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
import yaml

from octavo_cluster import binaries, shell

if TYPE_CHECKING:
    from collections.abc import Callable

    from octavo_cluster.apiserver import ApiServer

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]
INSTALL: Final = ROOT / "manifests" / "install"
MONITORING: Final = ROOT / "manifests" / "monitoring"

Manifest: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def kustomized() -> list[Manifest]:
    """What kustomize makes of the folder."""
    kubectl = binaries.ensure(["kubectl"]) / "kubectl"
    return list(yaml.safe_load_all(shell.run([kubectl, "kustomize", INSTALL]).stdout))


def by_identity(objects: list[Manifest]) -> dict[tuple[str, str, str], Manifest]:
    identified = {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in objects}
    assert len(identified) == len(objects)
    return identified


def test_kustomize_makes_the_charts_objects_and_their_namespace(
    kustomized: list[Manifest], template: Callable[..., list[Manifest]]
) -> None:
    ours, charts = by_identity(kustomized), by_identity(template())

    namespace = ours.pop(("Namespace", "", "octavo-system"))

    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for one in charts.values():
        metadata = one["metadata"]
        assert metadata.get("labels", {}).pop("app.kubernetes.io/managed-by", "Helm") == "Helm"
        metadata.get("labels", {}).pop("helm.sh/chart", None)
        if metadata.pop("annotations", {"helm.sh/resource-policy": "keep"}) != {"helm.sh/resource-policy": "keep"}:
            pytest.fail(f"{metadata['name']} has annotations that kustomize's users miss")
    assert ours == charts


def test_kustomize_makes_what_the_chart_adds_for_monitoring(template: Callable[..., list[Manifest]]) -> None:
    kubectl = binaries.ensure(["kubectl"]) / "kubectl"
    ours = by_identity(list(yaml.safe_load_all(shell.run([kubectl, "kustomize", MONITORING]).stdout)))
    charts = by_identity(template({"monitoring": {"podMonitor": True, "alerts": True}}))
    for identity in by_identity(template()):
        del charts[identity]

    for one in charts.values():
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            del one["metadata"]["labels"][label]
    assert ours == charts
    assert {kind for kind, *_ in ours} == {"PodMonitor", "PrometheusRule"}


def test_the_generated_files_are_up_to_date() -> None:
    command: list[str | Path] = [sys.executable, ROOT / "manifests" / "generate.py", "--check"]

    answer = shell.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "e2e")}, check=False)

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_the_api_server_takes_the_whole_folder(api_server: ApiServer) -> None:
    # A dry run creates no namespace for what is in it.
    api_server.kubectl("apply", "--server-side", f"--filename={INSTALL / 'namespace.yaml'}")

    answer = api_server.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts", f"--kustomize={INSTALL}"
    )

    assert answer.stderr == ""
    assert "deployment.apps/octavo-operator serverside-applied (server dry run)" in answer.stdout
