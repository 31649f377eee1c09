"""Events: what changed, for `kubectl describe`. Told on transitions only, so a steady state tells nothing.

`of_plan` and `of_transition` are pure; `post` sends. Called by reconcile.py. An event that cannot be posted is logged
and let go: the conditions carry the truth, events are its history.
"""

import logging
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from octavo_operator import names
from octavo_operator.decide import Plan
from octavo_operator.diagnosis import Cause
from octavo_operator.errors import ApiError
from octavo_operator.kube import Kube
from octavo_operator.resources import CONTROLLER_REVISION, EVENT, Json
from octavo_operator.status import condition

NOTE_LIMIT: Final = 1024  # bytes; the API server refuses longer notes

_IN_PERCENT: Final = {cause.value.reason for cause in (Cause.PULLING, Cause.LOADING)}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing to tell about an InferenceService."""

    type: Literal["Normal", "Warning"]
    reason: str  # CamelCase
    action: str  # what the operator was doing
    note: str  # a sentence


def of_plan(plan: Plan, created: Iterable[Json]) -> list[Event]:
    """Tell which children were made and which were removed, an event for each of the two.

    ControllerRevisions are the operator's own books and no news.
    """
    books = CONTROLLER_REVISION.kind
    made = ", ".join(f"{child['kind']} {child['metadata']['name']}" for child in created if child["kind"] != books)
    removed = ", ".join(f"{child.kind} {child.name}" for child in plan.delete if child.kind != books)
    happened = [Event("Normal", "Created", "Apply", f"created {made}")] if made else []
    return [*happened, Event("Normal", "Deleted", "Delete", f"deleted {removed}")] if removed else happened


def of_transition(previous: Json, status: Json) -> list[Event]:
    """Tell that Ready has another status or another reason, and how far a pull or a load is."""
    before, after = condition(previous, "Ready"), condition(status, "Ready")
    same = (before.get("status"), before.get("reason")) == (after["status"], after["reason"])
    advanced = after["reason"] in _IN_PERCENT and "%" in after["message"] and before.get("message") != after["message"]
    if same and not advanced:
        return []
    warns = after["status"] == "False" and after["reason"] != "Suspended"
    return [Event("Warning" if warns else "Normal", after["reason"], "Reconcile", after["message"])]


async def post(kube: Kube, service: Json, events: Iterable[Event]) -> None:
    """Send events about an InferenceService."""
    metadata = service["metadata"]
    for event in events:
        _logger.info("%s/%s: %s: %s", metadata["namespace"], metadata["name"], event.reason, event.note)
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": metadata["namespace"]},
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": f"{names.GROUP}/octavo-operator",
            "reportingInstance": socket.gethostname(),
            "type": event.type,
            "reason": event.reason,
            "action": event.action,
            "note": event.note.encode()[:NOTE_LIMIT].decode(errors="ignore"),
            "regarding": {
                "apiVersion": service["apiVersion"],
                "kind": service["kind"],
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
        }
        try:
            await kube.create(EVENT, metadata["namespace"], body)
        except ApiError as error:
            _logger.warning("%s/%s: the event was not posted: %s", metadata["namespace"], metadata["name"], error)
