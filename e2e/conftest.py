"""Fixtures of the end-to-end tests: a namespace of a test's own, and the sample served in one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from octavo_cluster import paths, product
from octavo_cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image


@pytest.fixture
def namespace(
    operator_installed: Cluster, product_images: tuple[Image, Image], request: pytest.FixtureRequest
) -> Iterator[Workspace]:
    """A namespace of the test's own."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:50].strip("-")
    product.make_namespace(operator_installed, name)
    yield Workspace(operator_installed, name, product_images[1])
    operator_installed.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def served(operator_installed: Cluster, product_images: tuple[Image, Image]) -> Iterator[Workspace]:
    """A namespace in which the sample is applied as it is, and Ready under the name smollm2."""
    name = "e2e-served"
    product.make_namespace(operator_installed, name)
    where = Workspace(operator_installed, name, product_images[1])
    where.put_model("models")
    where.kubectl("apply", f"--filename={paths.PROJECT}/manifests/samples/inferenceservice.yaml")
    where.await_ready("smollm2")
    yield where
    operator_installed.kubectl("delete", "namespace", name, "--wait=false")
