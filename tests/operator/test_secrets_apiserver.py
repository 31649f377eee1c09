"""Where values that are nobody's business do not turn up, searched for after a run with marked ones."""

import base64
import json
from typing import Any, Final

import pytest

from octavo_cluster.playground import Playground

pytestmark = pytest.mark.apiserver

KEY: Final = "marked-api-key-4711"
TOKEN: Final = "marked-hub-token-4711"  # noqa: S105 - a mark to be searched for
PLAIN: Final = "marked-plain-value-4711"
SPEC: Final[dict[str, Any]] = {
    "model": {"source": "hf://org/gated:model.gguf", "tokenSecret": {"name": "hub"}},
    "endpoint": {"apiKeySecret": {"name": "keys"}},
    "pod": {"env": [{"name": "PROXY_PASSWORD", "value": PLAIN}]},
}


def secret(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def test_no_secret_is_in_log_events_status_or_children(playground: Playground) -> None:
    playground.kubectl("apply", "--filename=-", document=secret("hub", token=TOKEN))
    playground.kubectl("apply", "--filename=-", document=secret("keys", key=KEY))
    with playground.operator() as operator:  # its log is that of --log-level=debug
        playground.apply(**SPEC)
        playground.await_ready("Unknown", "Starting")
        playground.play_deployment_controller(replicas=1, ready=0)
        waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}
        pull = {"name": "pull", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": waiting}
        conditions = [{"type": "PodScheduled", "status": "True"}]
        playground.play_pod(
            "llama-1-a", {"phase": "Pending", "conditions": conditions, "initContainerStatuses": [pull]}
        )
        playground.await_ready("False", "SecretNotFound")
        playground.apply(**{**SPEC, "replicas": 0})
        playground.await_ready("False", "Suspended")
        operator.rest(reconciles=3)

    log = operator.log.read_text()
    events = playground.kubectl("get", "events", "--output=json")
    status = json.dumps(playground.there("ois")["status"])
    kinds = "deployments,services,networkpolicies,poddisruptionbudgets,serviceaccounts,controllerrevisions"
    children = json.loads(playground.kubectl("get", kinds, "--output=json"))["items"]
    assert "SecretNotFound" in events
    for marked in (KEY, TOKEN):
        for text in (log, events, status, json.dumps(children)):
            assert marked not in text
            assert base64.b64encode(marked.encode()).decode() not in text
    # A plain value of the spec is in the pods' template, where its author put it, and nowhere else.
    for text in (log, events, status, *(json.dumps(child["metadata"].get("annotations")) for child in children)):
        assert PLAIN not in text
