"""An InferenceService and its pods as text for people: `kubectl octavo status`. Pure; called by cli.py.

Says what the status says, in its own words: nothing is found out here.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from octavo_operator import names

Json = dict[str, Any]

_INDENT: Final = "  "


def report(service: Json, pods: Sequence[Json], events: Iterable[Json]) -> str:
    """All that is known of a service.

    Args:
        service: the InferenceService as the API server has it.
        pods: its pods.
        events: those of the service, events.k8s.io/v1 or core/v1, oldest first.
    """
    metadata, status = service["metadata"], service.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions", ())}
    lines = [f"{metadata['name']} in {metadata['namespace']}: {_headline(conditions)}"]
    if "message" in (ready := conditions.get("Ready", {})):
        lines.append(_INDENT + ready["message"])
    if status.get("observedGeneration", 0) < metadata.get("generation", 0):
        lines.append(f"{_INDENT}The operator has not looked at the newest change of the spec yet.")
    lines += ["", *_table(_facts(service, status))]
    if others := [each for type_, each in conditions.items() if type_ != "Ready"]:
        told = ((each["type"], each["status"], each["reason"], each["message"]) for each in others)
        lines += ["", *_table([("CONDITION", "STATUS", "REASON", "MESSAGE"), *told])]
    if pods:
        lines += ["", *_table([("POD", "PHASE", "READY", "RESTARTS", "NODE"), *map(_pod, pods)])]
    if happened := [(each["reason"], each.get("note") or each.get("message", "")) for each in events]:
        lines += ["", *_table([("EVENT", "MESSAGE"), *happened])]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _headline(conditions: dict[str, Json]) -> str:
    ready = conditions.get("Ready")
    if ready is None:
        return "no status yet; is the operator running, and does it serve this namespace?"
    words = {"True": "ready", "False": "not ready", "Unknown": "on its way"}
    return words[ready["status"]] + ("" if ready["status"] == "True" else f" ({ready['reason']})")


def _facts(service: Json, status: Json) -> Iterator[tuple[str, str]]:
    yield "Model", service["spec"]["model"]["source"]
    if facts := status.get("model"):
        yield "", ", ".join(f"{key} {value}" for key, value in facts.items() if not isinstance(value, dict | list))
    if profiles := service["spec"].get("profiles"):
        yield "Profiles", ", ".join(profile["name"] for profile in profiles)
    if adapters := service["spec"].get("adapters"):
        yield "Adapters", ", ".join(adapter["name"] for adapter in adapters)
    if "url" in status:
        yield "URL", status["url"]
    if "replicas" in status:
        yield "Pods", f"{status.get('readyReplicas', 0)} of {status['replicas']} serve"
    if status.get("tensorParallelSize", 1) > 1:
        yield "GPUs", f"{status['tensorParallelSize']} share the model in each pod"
    if rollout := status.get("rollout"):
        order = "an old pod ends before a new one starts" if rollout["strategy"] == "replace" else "new pods come first"
        yield "Rollout", f"{order}: {rollout['message']}"
    if "engineImage" in status:
        yield "Image", status["engineImage"]


def _pod(pod: Json) -> tuple[str, ...]:
    status = pod.get("status", {})
    containers: list[Json] = status.get("containerStatuses", [])
    engine = next((each for each in containers if each["name"] == names.ENGINE_CONTAINER), Json())
    phase = "Terminating" if "deletionTimestamp" in pod["metadata"] else status.get("phase", "Pending")
    ready = "yes" if engine.get("ready") else "no"
    node = pod.get("spec", {}).get("nodeName", "-")
    return pod["metadata"]["name"], phase, ready, str(engine.get("restartCount", 0)), node


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of equally many cells, in columns; the last one is as long as it is."""
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)] if cells else []
    return [
        _INDENT + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    ]
