"""Pytest fixtures: an API server without nodes, a whole cluster, and a cluster with Octavo installed.

A plugin: name it in a conftest (`pytest_plugins = ["octavo_cluster.fixtures"]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from octavo_cluster.apiserver import ApiServer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """A real kube-apiserver, without nodes; one for the session, so give each test a namespace of its own."""
    with ApiServer() as server:
        yield server
