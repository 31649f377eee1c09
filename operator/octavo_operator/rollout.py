"""How pods are replaced: when, and whether a new one comes before an old one goes. Pure; called by reconcile.py.

Two rules of their own stand between what the builders render and what is applied:

- **An operator's upgrade replaces no pod.** The pod template that was rendered is kept in a ControllerRevision. As long
  as the spec does not ask for other pods, that one is applied, also by a later operator that would render another.
  Whether a change of the spec asks for other pods is seen by rendering it: the revision remembers for which generation
  the operator has rendered what. The annotation `serving.octavo.dev/update` of the InferenceService asks for it, too.
  Where the revision has been deleted, it is made anew from the Deployment.
- **A rollout never waits for itself.** A new pod comes first, so that nobody notices. Where it waits for GPUs that the
  old pods hold, an old one goes first, from then on until the rollout is over.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired.metadata import Manifest, object_meta
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.ownership import our_fields, owned_part
from octavo_operator.resources import CONTROLLER_REVISION, DEPLOYMENT, Json

GPU_PATIENCE_SECONDS: Final = 20.0  # a pod that has no GPUs for so long will not get any from elsewhere
RENDERED_ANNOTATION: Final = f"{names.GROUP}/rendered"  # GENERATION/HASH of what was rendered last for the spec
_GPUS_TAKEN: Final = "no GPUs are free for one more pod"
_BY_DEFAULT: Final = "there is room for one more pod, as far as is known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which of two pods comes first when one takes the other's place."""

    ends_first: bool  # the old pod ends before the new one starts
    why: str  # a clause
    look_again: float | None = None  # seconds, after which the order may be another


def choose_order(service: InferenceService, observed: Observed, now: datetime) -> Order:
    """Whether an old pod has to end first."""
    cache, strategy = service.spec.model.cache, service.spec.rollout.strategy
    if cache is not None and cache.is_for_one_pod:
        return Order(ends_first=True, why="only one pod can have the volume of model.cache")
    if strategy != "auto":
        return Order(ends_first=strategy == "replace", why=f"rollout.strategy is {strategy}")
    deployment = observed.child(DEPLOYMENT.kind, names.deployment(service.name))
    if deployment is not None and _has_old_pods(deployment):
        if deployment.max_surge == 0:
            return Order(ends_first=True, why=_GPUS_TAKEN)
        waits = [_waited(pod, now) for pod in observed.pods if _lacks_gpus(pod)]
        if waits and max(waits) >= GPU_PATIENCE_SECONDS:
            return Order(ends_first=True, why=_GPUS_TAKEN)
        if waits:
            return Order(ends_first=False, why=_BY_DEFAULT, look_again=GPU_PATIENCE_SECONDS - max(waits))
    return Order(ends_first=False, why=_BY_DEFAULT)


def _has_old_pods(deployment: Child) -> bool:
    status = deployment.status
    if status.get("observedGeneration", 0) < deployment.generation:
        return deployment.max_surge == 0  # its controller has not looked yet: stay with what was chosen
    return bool(status.get("replicas", 0) > status.get("updatedReplicas", 0))


def _lacks_gpus(pod: Pod) -> bool:
    return (
        not pod.deleting and pod.unscheduled is not None and f"Insufficient {names.GPU_RESOURCE}" in pod.unscheduled[1]
    )


def _waited(pod: Pod, now: datetime) -> float:
    try:
        since = datetime.fromisoformat(pod.unscheduled_since)
    except ValueError:
        return 0.0
    return (now - since).total_seconds()


def keeps_count(observed: Observed, name: str) -> bool:
    """Whether the number of pods of the service `name` is somebody else's: that of an autoscaler, now or before.

    So a service whose autoscaling is switched off stays as large as it is until its spec gives a number.
    """
    deployment = observed.child(DEPLOYMENT.kind, names.deployment(name))
    if deployment is None or deployment.owned_fields is None:
        return False
    return "f:replicas" not in json.loads(deployment.owned_fields).get("f:spec", {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The manifests with the pod template that is to be applied."""

    manifests: tuple[Manifest, ...]
    update_available: bool  # this operator would render another one

    @property
    def engine_image(self) -> str:
        """The image that the pods are to run."""
        (deployment,) = (manifest for manifest in self.manifests if manifest["kind"] == DEPLOYMENT.kind)
        image: str = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        return image


def has_lost_revision(service: InferenceService, observed_generation: int | None, observed: Observed) -> bool:
    """Whether somebody has deleted the revision of a Deployment whose spec was acted on already."""
    deployment = observed.child(DEPLOYMENT.kind, names.deployment(service.name))
    return (
        observed_generation == service.metadata.generation
        and deployment is not None
        and _is_of(deployment, service)
        and not _revisions(service, observed)
    )


def applied_template(deployment: Json) -> Manifest | None:
    """The pod template of a live Deployment as it was applied, without what others and the server have added."""
    fields = our_fields(deployment["metadata"])
    template: Manifest | None = owned_part(fields, deployment)["spec"].get("template") if fields else None
    return template


def freeze(
    service: InferenceService, manifests: Iterable[Manifest], observed: Observed, lost: Manifest | None = None
) -> Frozen:
    """Put the kept template into the Deployment unless the spec asks for another; add the revision that keeps it.

    Args:
        service: the resource.
        manifests: as rendered.
        observed: what there is.
        lost: the template as it was applied, if `has_lost_revision`.
    """
    rendered = tuple(manifests)
    (fresh,) = (manifest["spec"]["template"] for manifest in rendered if manifest["kind"] == DEPLOYMENT.kind)
    template, generation = _kept(service, fresh, observed) or (lost or fresh, service.metadata.generation or 0)
    kept = tuple(
        {**manifest, "spec": {**manifest["spec"], "template": template}}
        if manifest["kind"] == DEPLOYMENT.kind
        else manifest
        for manifest in rendered
    )
    revision = _revision(service, template, generation, fresh)
    return Frozen(manifests=(*kept, revision), update_available=template != fresh)


def _is_of(child: Child, service: InferenceService) -> bool:
    return not child.deleting and child.owner is not None and child.owner.uid == service.metadata.uid


def _revisions(service: InferenceService, observed: Observed) -> list[Child]:
    return [
        child
        for child in observed.children.values()
        if child.kind == CONTROLLER_REVISION.kind and child.data is not None and _is_of(child, service)
    ]


def _kept(service: InferenceService, fresh: Manifest, observed: Observed) -> tuple[Manifest, int] | None:
    """The kept template and the generation for which it was made, if it still serves."""
    newest = max(_revisions(service, observed), key=lambda child: (child.revision, child.name), default=None)
    if newest is None or newest.data is None:
        return None
    rendered_for, _, rendered = newest.annotations.get(RENDERED_ANNOTATION, "").partition("/")
    same_spec = rendered_for == str(service.metadata.generation or 0) or rendered == _digest(fresh)
    if not same_spec or newest.annotations.get(names.UPDATE_ANNOTATION) != _asked_for(service):
        return None
    template: Manifest = json.loads(newest.data)["template"]
    return template, newest.revision


def _asked_for(service: InferenceService) -> str | None:
    return service.metadata.annotations.get(names.UPDATE_ANNOTATION)


def _revision(service: InferenceService, template: Manifest, generation: int, fresh: Manifest) -> Manifest:
    metadata = object_meta(service, names.revision(service.name, _digest(template)))
    asked_for = _asked_for(service)
    annotations = {
        RENDERED_ANNOTATION: f"{service.metadata.generation or 0}/{_digest(fresh)}",
        **({names.UPDATE_ANNOTATION: asked_for} if asked_for is not None else {}),
    }
    return {
        "apiVersion": CONTROLLER_REVISION.api_version,
        "kind": CONTROLLER_REVISION.kind,
        "metadata": {**metadata, "annotations": annotations},
        "data": {"template": template},
        "revision": generation,
    }


def _digest(template: Manifest) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
