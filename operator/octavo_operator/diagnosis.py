"""What can be the matter with a service, and how that is seen in its pods. Pure; called by status.py.

`Cause` is the one table of it: what becomes of the condition Ready, the reason (part of the API) and the message, which
says the way out wherever there is one. Messages leave out what differs from one failure to the next (times, addresses,
generated names), so that a service that stays broken is not written again and again.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import weights
from octavo_operator.observe import IMAGE_REASONS, Container, Pod, Termination
from octavo_operator.resources import Json

MESSAGE_LIMIT: Final = 1024  # characters of what others say, in our messages


class _Row(NamedTuple):
    ready: str  # the status of Ready
    reason: str  # of Ready and Progressing, and of Available where nothing serves
    message: str  # a template; {pods} is such as "2 of 3 pods"


class Cause(Enum):
    """Why a service is not ready (or that it is), the gravest first: of several, the first is told.

    Of what is on its way the pod that is least far is told, so that what is told only advances. PodFailed
    is so late because the remains of an evicted pod stay for long; its successor's state is the news.
    """

    INVALID_SPEC = _Row("False", "InvalidSpec", "{detail}")
    CHILD_CONFLICT = _Row(
        "False",
        "ChildConflict",
        '{kind} "{name}" exists already and does not belong to this InferenceService: '
        "delete it, or give the InferenceService another name",
    )
    FORBIDDEN = _Row("False", "Forbidden", "the API server does not let the operator write the children: {detail}")
    REFUSED = _Row("False", "ChildRefused", "the API server refuses a child: {detail}")
    SUSPENDED = _Row("False", "Suspended", "spec.replicas is 0: set it to 1 or more to serve the model")
    CHILD_LEAVING = _Row("Unknown", "ReplacingChild", '{kind} "{name}" is being deleted and will be made anew')
    QUOTA_EXCEEDED = _Row(
        "False",
        "QuotaExceeded",
        "pods cannot be created: {detail}: raise the ResourceQuota of namespace {namespace}, or lower spec.replicas, "
        "spec.resources or spec.accelerator.count",
    )
    ADMISSION_DENIED = _Row(
        "False", "AdmissionDenied", "pods cannot be created, an admission policy of the cluster is in the way: {detail}"
    )
    PODS_FORBIDDEN = _Row("False", "PodsForbidden", "pods cannot be created: {detail}")
    ENGINE_REFUSED = _Row("False", "{reason}", "{detail}")  # the engine's own reason, and its words but for flags
    MODEL_SOURCE_NOT_FOUND = _Row(
        "False",
        "ModelSourceNotFound",
        '{pods} cannot start: PersistentVolumeClaim "{claim}" does not exist in namespace {namespace}: '
        "create it, or correct {field}",
    )
    VOLUME_NOT_BOUND = _Row(
        "False",
        "VolumeNotBound",
        "{pods} wait for a volume: {detail} Look at the claim with `kubectl describe pvc --namespace {namespace}`; "
        "its StorageClass comes from spec.model.cache.storageClassName or is the cluster's default",
    )
    RESOURCES_SHORT = _Row("False", "Unschedulable", "{pods} wait for {wanted}: {detail} {way_out}")
    UNSCHEDULABLE = _Row("False", "Unschedulable", "{pods} cannot be scheduled: {detail}")
    IMAGE_PULL_FAILED = _Row(
        "False",
        "ImagePullFailed",
        '{pods} cannot pull the image "{image}": {why}',
    )
    SECRET_NOT_FOUND = _Row("False", "SecretNotFound", "{pods} cannot start: {detail}: create it, or correct {field}")
    MOUNT_FAILED = _Row("False", "VolumeMountFailed", "{pods} cannot start: {detail}")
    CONTAINER_START = _Row("False", "ContainerStartFailed", '{pods} cannot start the container "{container}": {detail}')
    OUT_OF_MEMORY = _Row(
        "False",
        "OutOfMemory",
        '{pods} ran out of memory in the container "{container}": raise spec.resources.limits.memory, '
        "or lower spec.engine.maxModelLen or maxNumSeqs",
    )
    CRASHED = _Row(
        "False", "ContainerCrashed", 'the container "{container}" of {pods} ended with exit code {code}: {detail}'
    )
    READINESS_FAILING = _Row(
        "False",
        "ReadinessFailing",
        "{pods} have served the model and do not any more: the engine runs, but GET /ready fails; its log says why",
    )
    STALLED = _Row("False", "ProgressDeadlineExceeded", "no pod has become ready for too long: {detail}")
    GATED = _Row("Unknown", "SchedulingGated", "{pods} wait for their scheduling gates to be lifted")
    STARTING = _Row("Unknown", "Starting", "{pods} are being started")
    PULLING = _Row("Unknown", "Pulling", "{pods} pull {what} from {source}{percent}")
    LOADING = _Row("Unknown", "Loading", "{pods} load the model{percent}")
    POD_FAILED = _Row("False", "PodFailed", "{pods} failed: {detail}")
    ROLLING_OUT = _Row("Unknown", "RollingOut", "{detail}")
    READY = _Row("True", "Ready", "{detail}")


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause, with what fills its template."""

    cause: Cause
    fields: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, cause: Cause, **fields: str) -> "Finding":
        """A finding with its fields in a fixed order, so that equal ones are equal."""
        return cls(cause, tuple(sorted(fields.items())))

    @property
    def ready(self) -> str:
        """The status of Ready."""
        return self.cause.value.ready

    @property
    def reason(self) -> str:
        """The reason, a CamelCase word."""
        return self.cause.value.reason.format_map(dict(self.fields))

    def message(self, pods: str) -> str:
        """The message; `pods` says how many it concerns."""
        return self.cause.value.message.format_map({"pods": pods, **dict(self.fields)})


def diagnose(pod: Pod, service: InferenceService) -> Finding:
    """Why a pod is not ready."""
    if pod.phase == "Failed":
        return Finding.of(Cause.POD_FAILED, detail=stable(f"{pod.reason}: {pod.message}"))
    if pod.unscheduled is not None:
        return _diagnose_unscheduled(*pod.unscheduled, service)
    return next(filter(None, _troubles(pod, service)), None) or _progress(pod, service)


def _troubles(pod: Pod, service: InferenceService) -> Iterator[Finding | None]:
    """What is wrong with a pod that has a node, in the order in which it would happen."""
    for container in pod.all_containers:
        if container.waiting in IMAGE_REASONS:
            yield _diagnose_pull(container, pod.lost_pull_secrets, service)
        yield _diagnose_container(container, service)
    if pod.hindrance:
        detail = stable(pod.hindrance)
        yield _missing_secret(detail, service) or Finding.of(Cause.MOUNT_FAILED, detail=detail)
    for container in pod.containers:
        # One that has just been started is not ready either; then the pod has not been ready since it began.
        if container.name == names.ENGINE_CONTAINER and container.running and pod.ready_changed > container.started:
            yield Finding.of(Cause.READINESS_FAILING)


def _progress(pod: Pod, service: InferenceService) -> Finding:
    """How far a pod is in which nothing is wrong."""
    percent = "" if pod.percent is None else f": {pod.percent} %"
    pulled_by = weights.pulled_by(service)
    pulls = [container for container in pod.init_containers if container.name in pulled_by]
    if running := next((container for container in pulls if container.running), None):
        what, source = pulled_by[running.name]
        return Finding.of(Cause.PULLING, what=what, source=source, percent=percent)
    has_pulled = bool(pulls) and pulls[-1].ended is not None  # and well: otherwise that would have been told above
    if has_pulled or any(
        container.name == names.ENGINE_CONTAINER and container.running for container in pod.containers
    ):
        return Finding.of(Cause.LOADING, percent=percent)
    return Finding.of(Cause.STARTING)


def _diagnose_unscheduled(reason: str, message: str, service: InferenceService) -> Finding:
    if reason == "SchedulingGated":
        return Finding.of(Cause.GATED)
    namespace = service.metadata.namespace or ""
    missing_claim = re.search('persistentvolumeclaim "([^"]+)" not found', message)
    if missing_claim:
        field = _field_of_claim(missing_claim[1], service)
        return Finding.of(Cause.MODEL_SOURCE_NOT_FOUND, claim=missing_claim[1], namespace=namespace, field=field)
    # After the nodes' reasons the scheduler says why preempting others would not help, which says nothing more.
    detail = (
        re.split(r"[.,]? +(?:no new claims to deallocate, )?preemption:|[.] not found$", message)[0].rstrip(". ") + "."
    )
    if re.search(r"unbound (?:immediate )?PersistentVolumeClaims|persistent volumes? to bind", message):
        return Finding.of(Cause.VOLUME_NOT_BOUND, detail=detail, namespace=namespace)
    if short := sorted(set(re.findall(r"Insufficient ([^\s,]+[^\s,.])", message))):
        return _short_of(short, detail, service)
    return Finding.of(Cause.UNSCHEDULABLE, detail=detail)


def _field_of_claim(claim: str, service: InferenceService) -> str:
    """The field that names a PersistentVolumeClaim."""
    model = service.spec.model
    for adapter in service.spec.adapters:
        if adapter.source.startswith(f"pvc://{claim}/") and not model.source.startswith(f"pvc://{claim}/"):
            return f"the source of {adapter.name} in spec.adapters"
    return "spec.model.source" if model.cache is None else "spec.model.cache.claimName"


def _short_of(resources: Sequence[str], detail: str, service: InferenceService) -> Finding:
    """What no node has enough of, and how much of it each pod wants."""
    spec = service.spec
    requests = {**spec.resources.limits.to_dict(), **spec.resources.requests.to_dict()}
    if spec.accelerator.count is not None:
        requests[names.GPU_RESOURCE] = str(spec.accelerator.count)
    wanted = " and ".join(f"{each} ({requests[each]} a pod)" if each in requests else each for each in resources)
    way_out = (
        "Free GPUs or add nodes with them, or lower spec.accelerator.count"
        if names.GPU_RESOURCE in resources
        else "Add nodes, or lower spec.resources.requests"
    )
    return Finding.of(Cause.RESOURCES_SHORT, wanted=wanted, detail=detail, way_out=way_out)


def diagnose_creation(message: str, service: InferenceService) -> Finding:
    """Why pods cannot be created, from what the Deployment's controller was told."""
    detail = stable(message)
    if "exceeded quota" in detail:
        # What is used at the moment changes with every other pod of the namespace.
        detail = re.sub(r", used: .*?(?=, limited:|$)", "", detail)
        return Finding.of(Cause.QUOTA_EXCEEDED, detail=detail, namespace=service.metadata.namespace or "")
    if re.search(
        "admission webhook|violates PodSecurity|ValidatingAdmissionPolicy|no PriorityClass|RuntimeClass", detail
    ):
        return Finding.of(Cause.ADMISSION_DENIED, detail=detail)
    return Finding.of(Cause.PODS_FORBIDDEN, detail=detail)


# What registries and the node's container runtime say, and what that means; the first that fits.
_PULL_FAILURES: Final = (
    (r"couldn't parse image|invalid reference format", "that is no image's name: correct spec.engine.image"),
    (
        r"\b40[13]\b|unauthorized|authorization failed|authentication required|access denied|requested access",
        "its registry wants a login, or does not have it: name a Secret with the login in spec.pod.imagePullSecrets",
    ),
    (r"not found|manifest unknown|\b404\b", "its registry does not have it: correct spec.engine.image"),
    (
        r"no such host|connection refused|timeout|deadline exceeded|no route to host|unreachable|server misbehaving",
        "its registry cannot be reached from the node",
    ),
)


def _diagnose_pull(container: Container, lost_secrets: Sequence[str], service: InferenceService) -> Finding:
    """Why an image cannot be pulled."""
    said = container.waiting_message
    meant = (meaning for pattern, meaning in _PULL_FAILURES if re.search(pattern, said))
    why = next(meant, "check that it exists, and spec.pod.imagePullSecrets if its registry wants a login")
    named = {secret.name for secret in service.spec.pod.image_pull_secrets}
    for name in sorted(named.intersection(lost_secrets)):
        why += f'; the kubelet did not find the Secret "{name}" of spec.pod.imagePullSecrets'
    return Finding.of(Cause.IMAGE_PULL_FAILED, image=container.image, why=why)


_START_REASONS: Final = {
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "StartError",
    "ContainerCannotRun",
}


def _missing_secret(text: str, service: InferenceService) -> Finding | None:
    """The Secret or ConfigMap that the kubelet misses, and the field that names it."""
    patterns = (
        r'(?P<kind>secret|configmap) "(?P<name>[^"]+)" not found',
        r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) [^/]+/(?P<name>\S+)",
        r"(?P<key>references non-existent (?P<kind>secret|config) key): (?P<name>\S+)",
    )
    match = next((found for pattern in patterns if (found := re.search(pattern, text))), None)
    if match is None:
        return None
    kind, name, key = match["kind"], match["name"], match.groupdict().get("key")
    spec = service.spec
    model, keys = spec.model, spec.endpoint.api_key_secret
    named = [
        (keys, "spec.endpoint.apiKeySecret"),
        (model.token_secret, "spec.model.tokenSecret"),
        (model.credentials_secret, "spec.model.credentialsSecret"),
        *((each.token_secret, f"the tokenSecret of {each.name} in spec.adapters") for each in spec.adapters),
        *(
            (each.credentials_secret, f"the credentialsSecret of {each.name} in spec.adapters")
            for each in spec.adapters
        ),
    ]
    fields = {each.name: field for each, field in reversed(named) if each is not None}
    if key is not None and key.startswith("references"):  # of a volume, which says no more than the key
        volume = re.search('volume "([^"]+)"', text)
        logins = {names.CREDENTIALS_VOLUME: model.credentials_secret} | {
            f"{names.CREDENTIALS_VOLUME}-{number}": each.credentials_secret for number, each in enumerate(spec.adapters)
        }
        secret = logins.get(volume[1], keys) if volume is not None else keys
        name, key = (secret.name if secret is not None else name), name
    field = fields.get(name, "spec.pod.env") if kind.lower() == "secret" else "spec.pod.env"
    what = "ConfigMap" if kind.lower().startswith("config") else "Secret"
    detail = f'{what} "{name}" does not exist' if key is None else f'{what} "{name}" has no key "{key}"'
    return Finding.of(Cause.SECRET_NOT_FOUND, detail=detail, field=field)


def _diagnose_container(container: Container, service: InferenceService) -> Finding | None:
    """What is wrong with a container, if anything is.

    The end of the run before counts until the container is ready: while it starts anew it does not look healthier than
    it is, and the conditions do not flap between two crashes.
    """
    if container.ready:
        return None
    if container.waiting in _START_REASONS:
        detail = stable(container.waiting_message)
        if missing := _missing_secret(detail, service):
            return missing
        return Finding.of(Cause.CONTAINER_START, container=container.name, detail=detail)
    if container.ended is None or (container.ended.exit_code == 0 and container.waiting != "CrashLoopBackOff"):
        return None
    return _diagnose_end(container.name, container.ended)


def _diagnose_end(container: str, ended: Termination) -> Finding:
    """Why a container ended."""
    if ended.reason in _START_REASONS:
        return Finding.of(Cause.CONTAINER_START, container=container, detail=stable(ended.message))
    if ended.reason == "OOMKilled":
        return Finding.of(Cause.OUT_OF_MEMORY, container=container)
    refusal = _message_of_ours(ended.message)
    if re.fullmatch("[A-Z][A-Za-z0-9]{0,62}", str(refusal.get("reason"))) and isinstance(refusal.get("message"), str):
        detail = _in_terms_of_the_spec(refusal["message"])[:MESSAGE_LIMIT]
        return Finding.of(Cause.ENGINE_REFUSED, reason=refusal["reason"], detail=detail)
    detail = stable(ended.message) or "it left no message; its log may say more"
    return Finding.of(Cause.CRASHED, container=container, code=str(ended.exit_code), detail=detail)


# The fields that the operator makes flags of the engine from.
FIELDS: Final = {
    "--api-key-file": "spec.endpoint.apiKeySecret",
    "--device": "spec.engine.device",
    "--dtype": "spec.engine.dtype",
    "--gpu-memory-utilization": "spec.engine.gpuMemoryUtilization",
    "--lora-modules": "spec.adapters",
    "--max-model-len": "spec.engine.maxModelLen",
    "--max-num-seqs": "spec.engine.maxNumSeqs",
    "--profiles": "spec.profiles",
    "--quantization": "spec.engine.quantization",
    "--tensor-parallel-size": "spec.accelerator.count",
}


def _in_terms_of_the_spec(message: str) -> str:
    """The engine's words, with the fields in place of flags that users of the resource cannot give."""
    return re.sub("--[a-z][-a-z0-9]*", lambda flag: FIELDS.get(flag[0], flag[0]), message)


def _message_of_ours(text: str) -> Json:
    """The JSON that `octavo pull` and `octavo serve` leave behind in /dev/termination-log, or nothing."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):  # a container may leave anything
        return {}
    return message if isinstance(message, dict) else {}


def model_facts(pods: Iterable[Pod]) -> Mapping[str, Any]:
    """What the engine or `octavo pull` found out about the model, in the newest pod that tells."""
    for pod in sorted(pods, key=lambda pod: (pod.created, pod.name), reverse=True):
        for container in pod.all_containers:
            facts = _message_of_ours(container.ended.message).get("facts") if container.ended is not None else None
            if isinstance(facts, dict) and facts:
                return facts
    return {}


_VARYING: Final = re.compile(
    r"""pods\ "[^"]*"\ is\ forbidden:\ |                # the name of a pod that was not made
    \d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*(?:Z|[+-]\d\d:?\d\d)?\ ?|  # a time
    0x[0-9a-f]{6,}""",  # an address
    re.VERBOSE,
)


def stable(text: str) -> str:
    """The last line of somebody's message, without what differs from one failure to the next."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return _VARYING.sub("", lines[-1]).strip()[:MESSAGE_LIMIT] if lines else ""
