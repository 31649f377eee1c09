"""What to do: compares what should exist with what does. Pure; called by reconcile.py on every pass.

A child is left alone if two things hold. Its annotation `manifest-hash` is that of the manifest which should exist: so
nothing has been added, changed or dropped since it was applied. And its `managedFields` still say that we own each
field of that manifest: whoever changes or removes a field by other means takes it from us, because that is how the API
server keeps the books (https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management). So values
are never compared, and neither what the server defaults or normalises ("1000m" is "1"), nor what a mutating webhook
makes of an image's name, nor what an autoscaler, a mesh or a person adds, makes a difference.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from octavo_operator import names
from octavo_operator.observe import Child, Observed
from octavo_operator.ownership import owns
from octavo_operator.resources import DEPLOYMENT, Json

REPLICAS_MANAGER: Final = "octavo-replicas"  # keeps `replicas` when we let go of it, until the autoscaler takes it
FOREIGN_CHILD_SECONDS: Final = 10.0  # nothing tells us when an object that does not carry our label goes away


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The writes that bring what is there to what should be, in this order."""

    delete: tuple[Child, ...] = ()
    hand_over: tuple[Json, ...] = ()  # to apply as REPLICAS_MANAGER
    apply: tuple[Json, ...] = ()  # with metadata.uid where the object exists: to be changed, never to be created
    conflicts: tuple[Child, ...] = ()  # objects of the right name that belong to another; nothing is done to them
    leaving: tuple[Child, ...] = ()  # objects that will be gone soon, and then made anew
    requeue_after: float | None = None  # seconds; None: what is waited for comes as an event


def decide(uid: str, desired: Iterable[Json], observed: Observed) -> Plan:
    """Plan the writes.

    Args:
        uid: of the InferenceService.
        desired: the complete manifests of the children that should exist.
        observed: what exists: all children with our label, and whatever has the name of a desired one.
    """
    manifests = {(manifest["kind"], manifest["metadata"]["name"]): _with_hash(manifest) for manifest in desired}
    apply: list[Json] = []
    hand_over: list[Json] = []
    conflicts: list[Child] = []
    leaving: list[Child] = []
    for identity, manifest in manifests.items():
        child = observed.children.get(identity)
        if child is None:
            apply.append(manifest)
        elif child.deleting or _belongs_to_predecessor(child, uid):
            leaving.append(child)
        elif not _is_ours(child, uid):
            conflicts.append(child)
        elif not _is_as_applied(child, manifest):
            hand_over.extend(_hand_over_replicas(child, manifest))
            apply.append({**manifest, "metadata": {**manifest["metadata"], "uid": child.uid}})
    obsolete = tuple(
        child
        for identity, child in observed.children.items()
        if identity not in manifests and _is_ours(child, uid) and not child.deleting
    )
    return Plan(
        delete=obsolete,
        hand_over=tuple(hand_over),
        apply=tuple(apply),
        conflicts=tuple(conflicts),
        leaving=tuple(leaving),
        requeue_after=FOREIGN_CHILD_SECONDS if conflicts else None,
    )


def _with_hash(manifest: Json) -> Json:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), names.MANIFEST_HASH_ANNOTATION: digest}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def _is_ours(child: Child, uid: str) -> bool:
    return child.owner is not None and child.owner.uid == uid


def _belongs_to_predecessor(child: Child, uid: str) -> bool:
    """Whether it is the child of a deleted InferenceService of the same name, which the garbage collector will take."""
    owner = child.owner
    return owner is not None and (owner.kind, owner.name) == (names.KIND, child.service.name) and owner.uid != uid


def _is_as_applied(child: Child, manifest: Json) -> bool:
    if child.manifest_hash != manifest["metadata"]["annotations"][names.MANIFEST_HASH_ANNOTATION]:
        return False
    owned = json.loads(child.owned_fields or "{}")
    return all(
        owns(owned.get(f"f:{key}"), value)
        for key, value in _stated(manifest).items()
        if key not in {"apiVersion", "kind"}
    )


def _stated(manifest: Json) -> Json:
    """The manifest without what identifies the object: nobody owns that."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key not in {"name", "namespace"}}
    return {**manifest, "metadata": metadata}


def _hand_over_replicas(child: Child, manifest: Json) -> list[Json]:
    """Keep the number of replicas when the manifest stops giving one.

    A field that its only owner leaves out is removed, and the server would default it to 1: five pods would become one
    until the autoscaler has counted again. So another manager applies the same number first, and stays its owner
    until the autoscaler writes another.
    """
    if child.kind != DEPLOYMENT.kind or child.replicas is None or "replicas" in manifest["spec"]:
        return []
    if "f:replicas" not in json.loads(child.owned_fields or "{}").get("f:spec", {}):
        return []
    metadata = manifest["metadata"]
    return [
        {
            "apiVersion": manifest["apiVersion"],
            "kind": manifest["kind"],
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": child.uid},
            "spec": {"replicas": child.replicas},
        }
    ]
