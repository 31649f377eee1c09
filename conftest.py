"""What every test may use: the API server without nodes, and the cluster; and how two workers share the tests out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["octavo_cluster.fixtures"]

WITH_A_CLUSTER = ("e2e/", "tests/helm/", "tests/operator/")


class Sharing(LoadScopeScheduling):
    """The tests around the API server and the cluster go to one worker, which mostly waits; each other file to any.

    The largest group is begun first, so the engine's tests compute beside the cluster's.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "cluster" if nodeid.startswith(WITH_A_CLUSTER) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Sharing:
    """Share the tests out like this."""
    return Sharing(config, log)
