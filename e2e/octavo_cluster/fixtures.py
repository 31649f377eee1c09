"""Pytest fixtures: an API server without nodes, a whole cluster, and a cluster with Octavo installed.

A plugin: name it in a conftest (`pytest_plugins = ["octavo_cluster.fixtures"]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from octavo_cluster import backend, prepare, product
from octavo_cluster.apiserver import ApiServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """A real kube-apiserver, without nodes; one for the session, so give each test a namespace of its own."""
    with ApiServer() as server:
        yield server


@pytest.fixture(scope="session")
def product_images() -> tuple[Image, Image]:
    """The operator's and the engine's image, built from this checkout."""
    return prepare.everything()


@pytest.fixture(scope="session")
def cluster(product_images: tuple[Image, Image]) -> Iterator[Cluster]:
    """A whole cluster with both images on its node; taken down at the end only if it was not up before."""
    cluster = backend.choose()
    found = cluster.status().health == "healthy"
    try:
        cluster.up()
        for image in product_images:
            cluster.load_image(image)
        yield cluster
    finally:
        if not found:
            cluster.down()


@pytest.fixture(scope="session")
def operator_installed(cluster: Cluster, product_images: tuple[Image, Image]) -> Iterator[Cluster]:
    """The cluster, with the operator of this checkout installed by Helm in a namespace that enforces `restricted`."""
    found = product.is_installed(cluster)
    product.install(cluster, *product_images)
    yield cluster
    if not found:
        product.uninstall(cluster)
