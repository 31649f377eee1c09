"""Fixtures for tests that run the operator's process against the API server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.playground import USER, Playground
from octavo_operator import names

ROOT: Final = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def octavo_server(api_server: ApiServer) -> ApiServer:
    """The API server with the CRD, and with the operator's rights given to a user of our own."""
    kubectl = api_server.kubectl
    kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
    documents = yaml.safe_load_all((ROOT / "manifests/install/rbac.yaml").read_text())
    (role,) = [
        each for each in documents if (each["kind"], each["metadata"]["name"]) == ("ClusterRole", "octavo-operator")
    ]
    role["metadata"] = {"name": USER}
    kubectl.apply(
        role,
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        },
    )
    return api_server


@pytest.fixture(scope="session")
def operator_kubeconfig(octavo_server: ApiServer) -> Path:
    """The kubeconfig of the user with the operator's rights."""
    return octavo_server.kubeconfig_for(USER)


@pytest.fixture
def playground(
    octavo_server: ApiServer, operator_kubeconfig: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Playground]:
    """A namespace of the test's own."""
    test = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
    namespace = test[:63].strip("-")
    kubectl = octavo_server.kubectl
    kubectl("create", "namespace", namespace)
    kubectl("wait", "serviceaccount/default", f"--namespace={namespace}", "--for=create", "--timeout=30s")
    with Playground(octavo_server, operator_kubeconfig, namespace, tmp_path) as prepared:
        yield prepared
    kubectl("delete", "namespace", namespace, "--wait=false")
