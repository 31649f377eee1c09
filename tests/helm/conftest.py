"""The chart, rendered by the real helm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from octavo_cluster import binaries, shell

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

CHART = Path(__file__).parents[2] / "helm" / "octavo"


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs helm with its own arguments, and with `values` that go before the chart's own."""
    program = binaries.ensure(["helm"]) / "helm"

    def run(
        *arguments: str | Path, values: dict[str, Any] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        given = () if values is None else ("--values", "-")
        return shell.run([program, *arguments, *given], stdin=json.dumps(values), check=check)

    return run


@pytest.fixture(scope="session")
def template(helm: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., list[dict[str, Any]]]:
    """Renders the objects of a release, by default called octavo in the namespace octavo-system and without tests."""

    def render(
        values: dict[str, Any] | None = None,
        *,
        release: str = "octavo",
        namespace: str = "octavo-system",
        tests: bool = False,
    ) -> list[dict[str, Any]]:
        printed = helm(
            *("template", release, CHART, "--namespace", namespace, "--kube-version", binaries.KUBERNETES),
            *(() if tests else ("--skip-tests",)),
            values=values,
        ).stdout
        return [document for document in yaml.safe_load_all(printed) if document is not None]

    return render
