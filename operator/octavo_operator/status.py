"""What to tell: the status of an InferenceService, from what is observed. Pure; called by reconcile.py on every pass.

Five conditions, each there at all times but the last, each rebuilt from scratch on every pass, so that none outlives
its cause:

    Ready        True: all that was asked for serves. False: something is broken, and it says what. Unknown: on its way.
    Available    True: at least one pod serves. False: none does.
    Progressing  False: there is no progress until somebody acts. True: it goes on, or is there.
    UpdateAvailable  True: this operator would make other pods than those that are there, and leaves them; rollout.py.
    Autoscaling  True: the number of replicas follows the load. Only for services with an autoscaler; scaling.py.

Messages are a function of the state alone, without clocks and counters that only grow: otherwise the steady state of a
broken service would be a stream of writes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.decide import Plan
from octavo_operator.desired.service import url
from octavo_operator.diagnosis import MESSAGE_LIMIT, Cause, Finding, diagnose, diagnose_creation, model_facts, stable
from octavo_operator.errors import ApiError, Forbidden
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.resources import DEPLOYMENT, Json
from octavo_operator.rollout import Frozen, Order
from octavo_operator.scaling import Told, autoscaling

CONDITION_TYPES: Final = ("Ready", "Available", "Progressing", "UpdateAvailable", "Autoscaling")


def build(
    service: InferenceService,
    *,
    previous: Json,
    observed: Observed,
    plan: Plan,
    order: Order,
    frozen: Frozen,
    failure: ApiError | None,
    now: datetime,
) -> Json:
    """The status of a service whose spec is valid.

    Args:
        service: the resource.
        previous: the status that is stored, for the times of the transitions.
        observed: what there is after the plan was carried out.
        plan: what was planned; its conflicts are told.
        order: which of two pods comes first in a rollout.
        frozen: the pod template that is applied, and whether there is a newer one.
        failure: why the plan could not be carried out, if so.
        now: the time of a transition.
    """
    deployment = observed.child(DEPLOYMENT.kind, names.deployment(service.name))
    replicas, serving = _counts(deployment)
    wanted = _wanted(service, deployment)
    finding, num_pods = _find(service, observed, plan, deployment, failure)
    status = {
        "observedGeneration": service.metadata.generation or 0,
        "conditions": _conditions(
            previous,
            service.metadata.generation or 0,
            finding,
            message=finding.message(f"{num_pods} of {max(wanted, num_pods)} pods"),
            serving=_sentence(serving, wanted) if serving else None,
            more={
                "UpdateAvailable": _update_available(service, frozen),
                "Autoscaling": autoscaling(service, observed),
            },
            now=now,
        ),
        "url": url(service),
        "replicas": replicas,
        "readyReplicas": serving,
        "selector": names.selector_text(service.name),
        "tensorParallelSize": service.spec.accelerator.tensor_parallel_size,
        "rollout": {"strategy": "replace" if order.ends_first else "surge", "message": order.why},
        "engineImage": frozen.engine_image,
    }
    facts = model_facts(observed.pods)
    return {**status, "model": facts} if facts else status


def build_invalid(
    name: str, generation: int, problem: str, *, previous: Json, observed: Observed, now: datetime
) -> Json:
    """The status of a service whose stored spec cannot be acted on: its children stay as they are, and are counted."""
    finding = Finding.of(Cause.INVALID_SPEC, detail=problem[:MESSAGE_LIMIT])
    replicas, serving = _counts(observed.child(DEPLOYMENT.kind, names.deployment(name)))
    conditions = _conditions(
        previous,
        generation,
        finding,
        message=finding.message(""),
        serving=_sentence(serving, replicas) if serving else None,
        more={"UpdateAvailable": ("Unknown", finding.reason, "what the pods should be is not known")},
        now=now,
    )
    counted = {"replicas": replicas, "readyReplicas": serving}
    return {**previous, **counted, "observedGeneration": generation, "conditions": conditions}


def ours(stored: Json) -> Json:
    """The stored status without conditions that others have put there."""
    conditions = [each for each in stored.get("conditions", ()) if each["type"] in CONDITION_TYPES]
    return {**stored, "conditions": conditions}


def condition(status: Json, type_: str) -> Json:
    """A condition of a status, or nothing."""
    found: Json = next((each for each in status.get("conditions", ()) if each["type"] == type_), {})
    return found


def _conditions(
    previous: Json,
    generation: int,
    finding: Finding,
    *,
    message: str,
    serving: str | None,
    more: Mapping[str, Told | None],
    now: datetime,
) -> list[Json]:
    stuck = finding.ready == "False" and finding.cause is not Cause.SUSPENDED
    told = {
        "Ready": (finding.ready, finding.reason, message),
        "Available": ("True", "PodsReady", serving)
        if serving
        else ("False", finding.reason, "no pod serves the model"),
        "Progressing": ("False" if stuck else "True", finding.reason, message),
        **{type_: each for type_, each in more.items() if each is not None},
    }
    time = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [
        {
            "type": type_,
            "status": status,
            "reason": reason,
            "message": text,
            "observedGeneration": generation,
            "lastTransitionTime": before["lastTransitionTime"] if before.get("status") == status else time,
        }
        for type_, (status, reason, text) in told.items()
        for before in [condition(previous, type_)]
    ]


def _update_available(service: InferenceService, frozen: Frozen) -> tuple[str, str, str]:
    """Status, reason and message of UpdateAvailable."""
    if not frozen.update_available:
        return "False", "UpToDate", "the pods are as this operator makes them"
    return (
        "True",
        "OperatorChanged",
        (
            "this operator would make the pods otherwise than the one before it did; they are replaced on the next "
            f"change of the spec that concerns them, or by `kubectl annotate --overwrite ois/{service.name} "
            f"{names.UPDATE_ANNOTATION}=$(date +%s)`"
        ),
    )


def _sentence(serving: int, wanted: int) -> str:
    return f"{serving} of {max(wanted, serving)} pods serve the model"


def _counts(deployment: Child | None) -> tuple[int, int]:
    """How many pods there are, and how many of them serve."""
    counts = deployment.status if deployment is not None else {}
    return counts.get("replicas", 0), counts.get("readyReplicas", 0)


def _wanted(service: InferenceService, deployment: Child | None) -> int:
    """How many pods there should be now."""
    if service.spec.replicas is not None:
        return service.spec.replicas
    if deployment is None or deployment.replicas is None:
        return 1 if service.spec.autoscaling is None else service.spec.autoscaling.min_replicas
    return deployment.replicas


def _find(
    service: InferenceService, observed: Observed, plan: Plan, deployment: Child | None, failure: ApiError | None
) -> tuple[Finding, int]:
    """The gravest finding, and how many pods it concerns."""
    findings = Counter[Finding]()
    if failure is not None:
        cause = Cause.FORBIDDEN if isinstance(failure, Forbidden) else Cause.REFUSED
        findings[Finding.of(cause, detail=str(failure)[:MESSAGE_LIMIT])] += 0
    for child in plan.conflicts:
        findings[Finding.of(Cause.CHILD_CONFLICT, kind=child.kind, name=child.name)] += 0
    for child in plan.leaving:
        findings[Finding.of(Cause.CHILD_LEAVING, kind=child.kind, name=child.name)] += 0
    wanted = _wanted(service, deployment)
    if not wanted:
        findings[Finding.of(Cause.SUSPENDED)] += 0
    elif not findings and deployment is not None and _is_complete(deployment, wanted):
        findings[Finding.of(Cause.READY, detail=_sentence(wanted, wanted))] += 0
    else:
        pods = _updated_pods(observed.pods, deployment)
        findings.update(_deployment_troubles(deployment, service, pods))
        findings.update(diagnose(pod, service) for pod in pods if not pod.ready)
        if any(each.cause in {Cause.PULLING, Cause.LOADING} for each in findings):
            # They take as long as they take, and end by themselves where they are stuck.
            findings = Counter({each: num for each, num in findings.items() if each.cause is not Cause.STALLED})
        if not findings:
            findings[_progress(deployment, wanted, num_ready=len(pods))] = wanted
    order = list(Cause)
    return min(findings.items(), key=lambda item: (order.index(item[0].cause), -item[1], item[0].fields))


def _is_seen(deployment: Child) -> bool:
    """Whether the Deployment's status speaks of its spec as it is."""
    return bool(deployment.status.get("observedGeneration", 0) >= deployment.generation)


def _is_complete(deployment: Child, wanted: int) -> bool:
    """Whether as many pods as wanted serve, all of them of the present template, and none is left of another."""
    status = deployment.status
    numbers = [status.get(field, 0) for field in ("replicas", "updatedReplicas", "readyReplicas")]
    return _is_seen(deployment) and deployment.replicas == wanted and numbers == [wanted] * 3


def _deployment_troubles(
    deployment: Child | None, service: InferenceService, updated: Sequence[Pod]
) -> Counter[Finding]:
    """What the Deployment itself tells of that no pod can tell; `updated` are the pods of the present template."""
    findings = Counter[Finding]()
    for told in deployment.status.get("conditions", ()) if deployment is not None and _is_seen(deployment) else ():
        message = told.get("message", "")
        if (told["type"], told["status"]) == ("ReplicaFailure", "True") and not _is_of_old_pods(message, updated):
            findings[diagnose_creation(message, service)] += 0
        if (told["type"], told.get("reason")) == ("Progressing", "ProgressDeadlineExceeded"):
            findings[Finding.of(Cause.STALLED, detail=stable(message))] += 0
    return findings


def _is_of_old_pods(message: str, updated: Sequence[Pod]) -> bool:
    """Whether a pod of another template than the present one could not be created.

    The Deployment tells that as long as it wants such a pod, also when those of the present template are there.
    """
    named = re.match(r'pods "[^"]*-([^-"]+)-[^-"]*" is forbidden', message)  # SERVICE-TEMPLATE-RANDOM
    return named is not None and bool(updated) and named[1] not in {pod.template for pod in updated}


def _progress(deployment: Child | None, wanted: int, *, num_ready: int) -> Finding:
    """How far things are while nothing is wrong; `num_ready` pods are ready, but its Deployment may not know yet."""
    _, serving = _counts(deployment)
    serving = max(serving, num_ready)
    if deployment is None or not serving:
        return Finding.of(Cause.STARTING)
    updated = deployment.status.get("updatedReplicas", 0) if _is_seen(deployment) else 0
    detail = f"{_sentence(serving, wanted)}; {updated} of {wanted} are of the latest version"
    return Finding.of(Cause.ROLLING_OUT, detail=detail)


def _updated_pods(pods: Sequence[Pod], deployment: Child | None) -> list[Pod]:
    """The pods of the present template: what ails the others is history, and they are about to go.

    They are those with the template of the newest pod, once the Deployment's controller tells that it has made any.
    """
    if deployment is None or not _is_seen(deployment) or not deployment.status.get("updatedReplicas"):
        return []
    there = [pod for pod in pods if not pod.deleting]
    newest = max(there, key=lambda pod: (pod.created, pod.name), default=None)
    return [pod for pod in there if newest is not None and pod.template == newest.template]
