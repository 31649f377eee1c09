"""What would change on a cluster if an InferenceService were applied: `kubectl octavo plan`. Called by cli.py.

Goes the operator's own way, from what is there to what it would write (rollout.py, desired/, decide.py), and has the
API server say by a dry run what would come of each write. So defaults, other managers' fields and refusals are real.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.decide import decide
from octavo_operator.desired import children
from octavo_operator.kubectl import Kubectl, KubectlFailed
from octavo_operator.observe import Child, Observed, Pod
from octavo_operator.resources import CHILDREN, CONTROLLER_REVISION, DEPLOYMENT, OPTIONAL, POD, Json, Resource
from octavo_operator.rollout import applied_template, choose_order, freeze, has_lost_revision, keeps_count

# The API server's and the operator's bookkeeping: it follows from the rest.
_BOOKS: Final = {"managedFields", "resourceVersion", "generation", "uid", "creationTimestamp"}
_BOOKS_IN_ANNOTATIONS: Final = {
    names.MANIFEST_HASH_ANNOTATION,
    "kubectl.kubernetes.io/last-applied-configuration",
    "deployment.kubernetes.io/revision",
}

VALUE_LIMIT: Final = 120  # characters of a value that are shown

Difference = tuple[str, Any, Any]  # path, before, after; None: not there


@dataclass(frozen=True, slots=True)
class Operator:
    """What the operator of the cluster was told, as far as children depend on it."""

    engine_image: str
    prometheus_url: str | None = None


def find_operator(kubectl: Kubectl, namespace: str) -> Operator | None:
    """The operator that serves a namespace, by its Deployment; None where there is none, or it is not ours to see."""
    selector = f"{names.NAME_LABEL}=octavo,{names.COMPONENT_LABEL}=operator"
    try:
        found = kubectl.get("deployments.apps", "--all-namespaces", f"--selector={selector}")["items"]
    except KubectlFailed:
        return None
    for deployment in found:
        told: dict[str, list[str]] = {}
        for argument in deployment["spec"]["template"]["spec"]["containers"][0].get("args", ()):
            flag, _, value = argument.partition("=")
            told.setdefault(flag, []).append(value)
        if "--engine-image" in told and namespace in told.get("--namespace", [namespace]):
            return Operator(told["--engine-image"][0], *told.get("--prometheus-url", ()))
    return None


def preview(kubectl: Kubectl, document: Json, operator: Operator | None) -> str:
    """What would change, for people: the InferenceService itself, its children by their fields, and its pods.

    Args:
        kubectl: for the cluster, and the namespace of a document that names none.
        document: the InferenceService as it would be applied.
        operator: what the operator was told; None: what `find_operator` finds.

    Raises:
        KubectlFailed: the API server refuses the InferenceService or a child, or does not let the user ask.
    """
    applied = kubectl.would_be(document)
    service = InferenceService.model_validate({key: value for key, value in applied.items() if key != "status"})
    namespace = applied["metadata"]["namespace"]
    kubectl = kubectl.within(namespace)
    before = kubectl.find(f"{names.PLURAL}.{names.GROUP}", service.name)
    operator = operator or find_operator(kubectl, namespace)
    if operator is None:
        running = (before or {}).get("status", {}).get("engineImage")
        operator = Operator(running or names.DEFAULT_ENGINE_IMAGE)
    acted_on = (before or {}).get("status", {}).get("observedGeneration")
    told = _tell_children(kubectl, service, operator, acted_on)
    lines = [*_tell(names.KIND, service.name, before, applied), *told]
    if not lines:
        return f"{service.name} in {namespace}: nothing would change\n"
    return f"{service.name} in {namespace} would change:\n" + "".join(f"  {line}\n" for line in lines)


def _tell_children(
    kubectl: Kubectl, service: InferenceService, operator: Operator, observed_generation: int | None
) -> Iterator[str]:
    """What the operator would write, object by object, and what becomes of the pods."""
    offered = [resource.kind for resource in OPTIONAL.values() if kubectl.serves(resource)]
    live, seen = _observe(kubectl, service.name, offered)
    order = choose_order(service, seen, datetime.now(UTC))
    desired = children(
        service,
        engine_image=operator.engine_image,
        offered=offered,
        ends_first=order.ends_first,
        keep_count=keeps_count(seen, service.name),
        prometheus_url=operator.prometheus_url,
    )
    lost = None
    if has_lost_revision(service, observed_generation, seen):
        lost = applied_template(live[DEPLOYMENT.kind, names.deployment(service.name)])
    frozen = freeze(service, desired, seen, lost)
    live, seen = _with_strangers(kubectl, frozen.manifests, live, seen)
    plan = decide(service.metadata.uid or "", frozen.manifests, seen)
    replaced = False
    for manifest in plan.apply:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == CONTROLLER_REVISION.kind:
            continue
        there, after = live.get((kind, name)), kubectl.would_be_ours(manifest)
        yield from _tell(kind, name, there, after)
        if kind == DEPLOYMENT.kind and there is not None:
            replaced = there["spec"]["template"] != after["spec"]["template"]
    for verb, some in (
        ("deleted", plan.delete),
        ("left alone, it belongs to somebody else", plan.conflicts),
        ("made anew, once it is gone", plan.leaving),
    ):
        yield from (f"{child.kind} {child.name}: {verb}" for child in some if child.kind != CONTROLLER_REVISION.kind)
    if replaced and seen.pods:
        first = "an old one ends first" if order.ends_first else "a new one comes first"
        yield f"Pods: each of the {len(seen.pods)} is replaced; {first}: {order.why}"


def _observe(kubectl: Kubectl, name: str, offered: Sequence[str]) -> tuple[dict[tuple[str, str], Json], Observed]:
    """What there is of the service, whole and as the operator sees it."""
    resources: list[Resource] = [each for kind, each in CHILDREN.items() if kind not in OPTIONAL or kind in offered]
    found = kubectl.labelled([*resources, POD], f"{names.SERVICE_LABEL}={name}")
    live = {(body["kind"], body["metadata"]["name"]): body for body in found if body["kind"] != POD.kind}
    pods = [Pod.from_json(body) for body in found if body["kind"] == POD.kind]
    there = {identity: Child.from_json(identity[0], body) for identity, body in live.items()}
    return live, Observed(children=there, pods=tuple(pods))


def _with_strangers(
    kubectl: Kubectl, manifests: Sequence[Json], live: Mapping[tuple[str, str], Json], seen: Observed
) -> tuple[dict[tuple[str, str], Json], Observed]:
    """Add what has the name of a child but not our label."""
    live, there = dict(live), dict(seen.children)
    for manifest in manifests:
        identity = manifest["kind"], manifest["metadata"]["name"]
        if identity not in live and (body := kubectl.find(CHILDREN[identity[0]].plural, identity[1])) is not None:
            live[identity] = body
            there[identity] = Child.from_json(identity[0], body)
    return live, Observed(children=there, pods=seen.pods)


def _tell(kind: str, name: str, before: Json | None, after: Json) -> list[str]:
    """A line for the object and one for each field; nothing where nothing would change."""
    if before is None:
        return [f"{kind} {name}: created"]
    changed = [f"  {path}: {_show(old, new)}" for path, old, new in differences(_content(before), _content(after))]
    return [f"{kind} {name}: changed", *changed] if changed else []


def _content(body: Json) -> Json:
    """An object without its status and what others keep books of in it."""
    metadata = {key: value for key, value in body["metadata"].items() if key not in _BOOKS}
    annotations = metadata.pop("annotations", {})
    if kept := {key: value for key, value in annotations.items() if key not in _BOOKS_IN_ANNOTATIONS}:
        metadata["annotations"] = kept
    return {**{key: value for key, value in body.items() if key != "status"}, "metadata": metadata}


def differences(before: Any, after: Any, path: str = "") -> Iterator[Difference]:
    """Where two objects differ, in the order of `before`. Items of a list that have names are matched by them."""
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif _is_named(before) and _is_named(after):
        old, new = ({item["name"]: item for item in items} for items in (before, after))
        for name in [*old, *(name for name in new if name not in old)]:
            yield from differences(old.get(name), new.get(name), f"{path}[{name}]")
    else:
        yield path, before, after


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and "name" in item for item in value)


def _show(before: Any, after: Any) -> str:
    if isinstance(before, list) and isinstance(after, list):
        gone = [f"-{_brief(item)}" for item in before if item not in after]
        come = [f"+{_brief(item)}" for item in after if item not in before]
        return " ".join([*gone, *come]) or "in another order"
    return f"{_brief(before)} -> {_brief(after)}"


def _brief(value: Any) -> str:
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= VALUE_LIMIT else f"{text[:VALUE_LIMIT]}..."
