"""What there is: the children and pods of one InferenceService, reduced to what the operator decides by.

The types are what the caches keep of each object (a few hundred bytes instead of kilobytes) and what decide.py and
status.py are given. `Child.from_json` and `Pod.from_json` are the only readers of those objects. Pure.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from octavo_operator import names
from octavo_operator.ownership import our_fields
from octavo_operator.resources import CONTROLLER_REVISION, Json, Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The controlling owner of an object."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A live object of one of the kinds that the operator makes."""

    service: Key  # the InferenceService that its label names
    kind: str
    name: str
    uid: str
    version: int  # resourceVersion
    generation: int = 0
    owner: Owner | None = None
    deleting: bool = False  # it waits for finalizers
    manifest_hash: str | None = None  # of the manifest that was applied last; see decide.py
    owned_fields: str | None = None  # fieldsV1 of our server-side apply, as JSON text: parsed only when it is compared
    replicas: int | None = None  # spec.replicas, of a Deployment
    max_surge: int | str | None = None  # of its rolling update
    revision: int = 0  # of a ControllerRevision
    data: str | None = None  # of a ControllerRevision, as JSON text
    annotations: Mapping[str, str] = field(default_factory=dict)  # of a ControllerRevision
    status: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, kind: str, body: Json) -> "Child":
        """Reduce an object; its kind is given because items of a list do not carry it."""
        metadata = body["metadata"]
        is_revision = kind == CONTROLLER_REVISION.kind
        return cls(
            service=_service(metadata),
            kind=kind,
            name=metadata["name"],
            uid=metadata["uid"],
            version=int(metadata["resourceVersion"]),
            generation=metadata.get("generation", 0),
            owner=_owner(metadata),
            deleting="deletionTimestamp" in metadata,
            manifest_hash=metadata.get("annotations", {}).get(names.MANIFEST_HASH_ANNOTATION),
            owned_fields=_owned_fields(metadata),
            replicas=body.get("spec", {}).get("replicas"),
            max_surge=body.get("spec", {}).get("strategy", {}).get("rollingUpdate", {}).get("maxSurge"),
            revision=body.get("revision", 0),
            data=json.dumps(body["data"]) if is_revision and "data" in body else None,
            annotations=metadata.get("annotations", {}) if is_revision else {},
            status=body.get("status", {}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Termination:
    """How a container ended last."""

    reason: str  # the kubelet's: Error, OOMKilled, Completed, ContainerCannotRun ...
    exit_code: int
    message: str  # the termination message: our JSON, or the end of the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The state of one container of a pod."""

    name: str
    image: str
    ready: bool
    running: bool
    started: str  # when this run began, RFC 3339; empty while it does not run
    waiting: str | None  # the kubelet's reason, such as ImagePullBackOff
    waiting_message: str
    ended: Termination | None  # the end of this run if it has ended, else that of the run before


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A live pod of the engine."""

    service: Key
    name: str
    version: int
    created: str  # RFC 3339, so that it sorts as text
    deleting: bool
    template: str  # names the pod template that it was made from
    phase: str
    reason: str  # of the whole pod, such as Evicted
    message: str
    ip: str  # empty until it has one
    ready: bool
    ready_changed: str  # when `ready` became what it is, RFC 3339
    unscheduled: tuple[str, str] | None  # (reason, message) of PodScheduled while it is False
    unscheduled_since: str  # RFC 3339
    init_containers: tuple[Container, ...]
    containers: tuple[Container, ...]
    hindrance: str = ""  # why the kubelet cannot start it, where only an event tells; see `hindrance`
    lost_pull_secrets: tuple[str, ...] = ()  # which only an event tells, too; see `lost_pull_secrets`
    percent: int | None = None  # of the model that it pulls or loads, where it says so itself; see loading.py

    @classmethod
    def from_json(cls, body: Json) -> "Pod":
        """Reduce a pod."""
        metadata, status = body["metadata"], body.get("status", {})
        conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
        scheduled = conditions.get("PodScheduled", {})
        return cls(
            service=_service(metadata),
            name=metadata["name"],
            version=int(metadata["resourceVersion"]),
            created=metadata.get("creationTimestamp", ""),
            deleting="deletionTimestamp" in metadata,
            template=metadata.get("labels", {}).get("pod-template-hash", ""),
            phase=status.get("phase", "Pending"),
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            ip=status.get("podIP", ""),
            ready=conditions.get("Ready", {}).get("status") == "True",
            ready_changed=conditions.get("Ready", {}).get("lastTransitionTime", ""),
            unscheduled=(
                (scheduled.get("reason", ""), scheduled.get("message", ""))
                if scheduled.get("status") == "False"
                else None
            ),
            unscheduled_since=scheduled.get("lastTransitionTime", ""),
            init_containers=tuple(_container(item) for item in status.get("initContainerStatuses", ())),
            containers=tuple(_container(item) for item in status.get("containerStatuses", ())),
        )

    @property
    def all_containers(self) -> tuple[Container, ...]:
        """The containers in the order in which they start."""
        return (*self.init_containers, *self.containers)

    @property
    def is_silent(self) -> bool:
        """Whether it has a node but no container yet, and nothing in it says why: then its events may."""
        return (
            self.phase == "Pending"
            and not self.deleting
            and self.unscheduled is None
            and bool(self.all_containers)
            and all(container.waiting in {"ContainerCreating", "PodInitializing"} for container in self.all_containers)
        )

    @property
    def loads_in(self) -> str | None:
        """The container that pulls, or loads the model, if one does; it can be asked how far it is."""
        if self.ready or self.deleting or not self.ip:
            return None
        ours = {names.PULL_CONTAINER, names.ENGINE_CONTAINER}
        running = (container.name for container in self.all_containers if container.running)
        return next((name for name in running if name in ours or name.startswith(names.ADAPTER_CONTAINER)), None)

    @property
    def cannot_pull(self) -> bool:
        """Whether an image cannot be pulled; for want of a Secret, its events say."""
        return not self.deleting and any(container.waiting in IMAGE_REASONS for container in self.all_containers)


IMAGE_REASONS: Final = {  # for which a container waits for its image in vain
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
}
_HINDRANCES: Final = {"FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox"}


def hindrance(events: Iterable[Json]) -> str:
    """Why the kubelet cannot start a pod, from the pod's events (events.k8s.io/v1); nothing once it has gone on."""
    newest = max(events, key=_last_seen, default=None)
    if newest is None or newest.get("reason") not in _HINDRANCES:
        return ""
    return str(newest.get("note", ""))


def lost_pull_secrets(events: Iterable[Json]) -> tuple[str, ...]:
    """The Secrets with a registry's login that the kubelet has looked for in vain, from the pod's events."""
    notes = (str(event.get("note")) for event in events if event.get("reason") == "FailedToRetrieveImagePullSecret")
    found = (re.search(r"image pull secrets \(([^)]*)\)", note) for note in notes)
    return tuple(sorted({name.strip() for match in found if match for name in match[1].split(",")}))


def _last_seen(event: Json) -> str:
    series = event.get("series") or {}
    times = (event.get("eventTime"), event.get("deprecatedLastTimestamp"), series.get("lastObservedTime"))
    return max(time or "" for time in times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """All that is there of one InferenceService."""

    children: Mapping[tuple[str, str], Child]  # by kind and name; ours or not
    pods: tuple[Pod, ...] = ()  # in the order of their names

    def child(self, kind: str, name: str) -> Child | None:
        """The live child, if there is one."""
        return self.children.get((kind, name))


def _service(metadata: Json) -> Key:
    return Key(metadata["namespace"], metadata.get("labels", {}).get(names.SERVICE_LABEL, ""))


def _owner(metadata: Json) -> Owner | None:
    for reference in metadata.get("ownerReferences", ()):
        if reference.get("controller"):
            return Owner(kind=reference["kind"], name=reference["name"], uid=reference["uid"])
    return None


def _owned_fields(metadata: Json) -> str | None:
    fields = our_fields(metadata)
    return None if fields is None else json.dumps(fields, separators=(",", ":"))


def _container(status: Json) -> Container:
    state = status.get("state", {})
    ended = state.get("terminated") or status.get("lastState", {}).get("terminated")
    waiting = state.get("waiting")
    return Container(
        name=status["name"],
        image=status.get("image", ""),
        ready=status.get("ready", False),
        running="running" in state,
        started=state.get("running", {}).get("startedAt", ""),
        waiting=waiting.get("reason", "") if waiting is not None else None,
        waiting_message=waiting.get("message", "") if waiting is not None else "",
        ended=None
        if ended is None
        else Termination(
            reason=ended.get("reason", ""),
            exit_code=ended.get("exitCode", 0),
            message=ended.get("message", ""),
        ),
    )
