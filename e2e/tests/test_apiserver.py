"""The API server without nodes: what it enforces, what it collects, what it logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from octavo_cluster.shell import wait_until

if TYPE_CHECKING:
    from octavo_cluster.apiserver import ApiServer

pytestmark = pytest.mark.apiserver


def config_map(name: str, **metadata: object) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **metadata}}


def namespace(api_server: ApiServer, name: str) -> str:
    api_server.kubectl("create", "namespace", name)
    return name


def test_owned_objects_are_collected_when_their_owner_goes(api_server: ApiServer) -> None:
    where = namespace(api_server, "collected")
    api_server.kubectl.apply(config_map("owner"), namespace=where)
    uid = api_server.kubectl.get("configmap", "owner", f"--namespace={where}")["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    api_server.kubectl.apply(config_map("owned", ownerReferences=[owner]), namespace=where)

    api_server.kubectl("delete", "configmap", "owner", f"--namespace={where}")

    def owned_is_there() -> str | None:
        gone = api_server.kubectl("get", "configmap", "owned", f"--namespace={where}", check=False).returncode != 0
        return None if gone else "the owned ConfigMap is still there"

    wait_until(owned_is_there, what="garbage collection", seconds=30)


def test_a_deployment_is_stored_but_makes_no_pods(api_server: ApiServer) -> None:
    where = namespace(api_server, "inert")
    api_server.kubectl("create", "deployment", "web", "--image=web", f"--namespace={where}")
    assert api_server.kubectl.get("replicasets,pods", f"--namespace={where}")["items"] == []


def test_the_audit_log_has_one_line_for_each_write_and_none_for_reads(api_server: ApiServer) -> None:
    where = namespace(api_server, "audited")
    api_server.kubectl.apply(config_map("written"), namespace=where)
    api_server.kubectl("get", "configmap", "written", f"--namespace={where}")

    events = [json.loads(line) for line in api_server.audit_log.read_text().splitlines()]
    about = [event for event in events if event["objectRef"].get("name") == "written"]

    assert [(event["verb"], event["user"]["username"]) for event in about] == [("patch", "admin")]


def test_a_user_without_a_role_is_forbidden_everything(api_server: ApiServer) -> None:
    nobody = api_server.kubeconfig_for("nobody")
    refused = api_server.kubectl("get", "pods", f"--kubeconfig={nobody}", check=False)
    assert refused.returncode != 0
    assert 'User "nobody" cannot list resource "pods"' in refused.stderr
