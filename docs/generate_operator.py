# ruff: noqa: INP001, E501 - a script that nobody imports; a row of a table is a line
"""Writes docs/conditions.md, resource.md and metrics.md from the operator's own tables.

    python docs/generate_operator.py           writes them
    python docs/generate_operator.py --check   only compares

Conditions and reasons are those of octavo_operator.diagnosis, status and scaling, and the refusals of octavo_engine;
what to do about each is in WAYS_OUT here. Fields are those of the CRD, metrics those of octavo_operator.metrics. Run by `make generate` and, with --check, by
tests/operator/test_docs.py.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.metrics import MetricWrapperBase

from octavo_engine import errors as engine_errors
from octavo_operator import metrics, names, scaling, status
from octavo_operator.api.crd import custom_resource_definition
from octavo_operator.diagnosis import Cause

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

FOLDER: Final = Path(__file__).parent
COMMAND: Final = "python docs/generate_operator.py"
NO_REFUSALS: Final = {"RequestInvalid", "EngineRefused"}  # of a request, and of a process to the other one

WAYS_OUT: Final = {
    # Ready
    "InvalidSpec": (
        "The stored spec predates a rule of the CRD. Correct the fields that the message names; the children stay"
        " as they are until then."
    ),
    "ChildConflict": (
        "Look whose it is: `kubectl get KIND NAME -o yaml`. Delete it or rename the InferenceService; the "
        "operator looks again every 10 seconds."
    ),
    "Forbidden": (
        "RBAC, a quota on objects or an admission policy is in the way of the operator. Compare its Role with the"
        " chart's; in namespaced mode check that the chart's watchNamespaces name this namespace."
    ),
    "ChildRefused": (
        "The API server's words name the field. What passes through from spec.pod or spec.resources is wrong for "
        "this cluster, or the cluster is older than the operator expects."
    ),
    "Suspended": "Nothing is wrong: replicas is 0.",
    "ReplacingChild": "Wait. If it lasts, something holds the old object: look at its metadata.finalizers.",
    "QuotaExceeded": "`kubectl describe resourcequota` in the namespace says what is used.",
    "AdmissionDenied": (
        "The message names the policy. Engine pods pass the pod security level `restricted`; a policy of the "
        "cluster's own wants more, often labels or a registry: spec.pod.labels, spec.engine.image."
    ),
    "PodsForbidden": "The message is the API server's to the Deployment's controller.",
    "ModelSourceNotFound": "`kubectl get pvc` in the namespace. Claims of other namespaces cannot be used.",
    "VolumeNotBound": (
        "No volume fits the claim, or its StorageClass has no provisioner, or waits for a node that has room for "
        "the pod."
    ),
    "Unschedulable": (
        "The scheduler's words say what each node lacks. In a rollout with all GPUs taken the operator ends an "
        "old pod first by itself, after 20 seconds."
    ),
    "ImagePullFailed": "The message says whether the name, the login or the way to the registry is at fault.",
    "SecretNotFound": (
        "Create it in the same namespace with the key that the message names; the kubelet tries again by itself."
    ),
    "VolumeMountFailed": "The message is the kubelet's; the node's CSI driver knows more.",
    "ContainerStartFailed": (
        "The container runtime could not start the process: a wrong image for the node's architecture, or a "
        "missing RuntimeClass or device plugin."
    ),
    "OutOfMemory": "The limit is too small for weights, KV cache and overhead: `octavo plan MODEL` says what it needs.",
    "ContainerCrashed": "`kubectl logs POD --previous` has the rest. A crash of the engine itself is a bug: report it.",
    "ReadinessFailing": (
        "GET /ready of the pod says why in JSON; GET /health tells a stuck engine, which the kubelet restarts."
    ),
    "ProgressDeadlineExceeded": "Nothing else is known to be wrong. Look at the pods' events and logs.",
    "SchedulingGated": "Whoever has put the gate there (a queue such as Kueue) lifts it.",
    "Starting": "Wait; what goes wrong gets a reason of its own.",
    "Pulling": "Wait; the percentage moves in steps of ten. A cache (spec.model.cache) saves the next pull.",
    "Loading": "Wait; a load may take as long as it makes progress.",
    "PodFailed": "The pod is over, mostly evicted; its successor is made already.",
    "RollingOut": "Wait; status.rollout says in which order pods are replaced and why.",
    "Ready": "Nothing to do.",
    # Available
    "PodsReady": "Nothing to do.",
    # UpdateAvailable
    "UpToDate": "Nothing to do.",
    "OperatorChanged": "Take it over when a restart suits you, by the command in the message.",
    # Autoscaling
    "Scaling": "Nothing to do.",
    "NoMeasurementYet": "Wait for the autoscaler's first round, 15 to 30 seconds.",
    "UnableToScale": "The message is the autoscaler's.",
    "ScalingDisabled": "The Deployment has been scaled to 0 by somebody else: scale it to 1 or more.",
    "NoMetricsAPI": "Install what the message names: [autoscaling.md](autoscaling.md).",
    "NoMetrics": (
        "The metrics API is there and has nothing of these pods: check that they are scraped, or that metrics-"
        "server reaches the nodes."
    ),
    "ScaledObjectNotReady": "The message is KEDA's; mostly Prometheus does not answer at the chart's prometheus.url.",
    # The engine's own
    "ConfigError": "An option in spec.engine.extraArgs is wrong, or two contradict each other.",
    "ModelNotFound": "Check path and file name of spec.model.source.",
    "SourceForbidden": (
        "Name a Secret in spec.model.tokenSecret (hf://; accept the model's licence with its account) or in "
        "spec.model.credentialsSecret (s3://, oci://, ollama://)."
    ),
    "SourceUnreachable": "Check DNS, proxy (spec.pod.env: HTTPS_PROXY) and egress policies of the namespace.",
    "StorageFull": "Give the pull more room: spec.model.cache.size, or resources.requests.ephemeral-storage.",
    "ModelInvalid": "The file is damaged or no model; pull it anew, in a cache by naming another revision.",
    "ModelUnsupported": "See [models.md](models.md) for what the engine runs.",
    "ModelfileInvalid": "The message names line and token.",
    "ModelDoesNotFit": (
        "Lower spec.engine.maxModelLen, raise the memory limit or accelerator.count; the message has the arithmetic."
    ),
    "HeadsNotDivisible": "Set spec.accelerator.count to one of the numbers that the message lists.",
    "TensorParallelInvalid": "Set spec.accelerator.count to one of the numbers that the message lists.",
    "DeviceMissing": "The container sees no GPU: check the device plugin and spec.pod.runtimeClassName.",
}

CONDITIONS_HEAD: Final = f"""\
# Conditions

Written by `{COMMAND}` from the tables by which the operator tells them. `kubectl octavo status NAME` prints them all;
`kubectl wait --for=condition=Ready ois/NAME` waits for the summary.

| condition | True | False | Unknown |
|---|---|---|---|
| Ready | all that was asked for serves | something is broken, and the message says what and the way out | on its way |
| Available | at least one pod serves | none does | |
| Progressing | it goes on, or is there | nothing gets further until somebody acts | |
| UpdateAvailable | this operator would make the pods otherwise, and leaves them | they are as it makes them | the spec is invalid |
| Autoscaling | the number of replicas follows the load | it does not, and the message says what is missing | not known yet |

Each carries the generation of the spec that it speaks of, and is made anew on every look: none outlives its cause. Reasons
are part of the API: a word does not change its meaning within a version. In a message, {{...}} stands for what is filled in.
"""

FIELDS_HEAD: Final = f"""\
# The resource, field by field

Written by `{COMMAND}` from the CRD; `kubectl explain ois.spec` says the same. InferenceServices are {names.API_VERSION},
short name `{names.SHORT_NAME}`. The API server refuses what breaks a bound or a rule, with a sentence that names the field. Defaults
are those of the CRD; the operator never writes a spec.
"""


METRICS_HEAD: Final = f"""\
# Metrics of the operator

Written by `{COMMAND}` from the module that has them. The operator serves them on port 9090 at /metrics; the
chart makes a PodMonitor (`monitoring.podMonitor`) and alerts on them (`monitoring.alerts`, [runbook.md](runbook.md)). Beside these
there are those of the Python process, `process_resident_memory_bytes` among them. The engine's metrics are its own, on the
port of the model; they have vLLM's names.
"""


def refusals() -> dict[str, str]:
    """The reasons for which the engine refuses to start, with what they mean."""
    classes = [each for _, each in inspect.getmembers(engine_errors, inspect.isclass)]
    found = [each for each in classes if issubclass(each, engine_errors.UserError)]
    return {
        each.__name__: (each.__doc__ or "").splitlines()[0]
        for each in sorted(found, key=lambda each: each.__name__)
        if each is not engine_errors.UserError and each.__name__ not in NO_REFUSALS
    }


def literal_reasons(module: ModuleType) -> list[tuple[str, str]]:
    """Each (reason, status) that a module writes down as a condition: a tuple that begins with a status."""
    found: list[tuple[int, str, str]] = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Tuple) and len(node.elts) == 3:
            first, second = node.elts[:2]
            if isinstance(first, ast.Constant) and isinstance(second, ast.Constant) and first.value in _STATUSES:
                found.append((node.lineno, str(second.value), str(first.value)))
    return list(dict.fromkeys((reason, told) for _, reason, told in sorted(found)))


_STATUSES: Final = ("True", "False", "Unknown")


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def way_out(reason: str) -> str:
    """What to do about a reason, as a cell; ends the process where nobody has written it."""
    if reason not in WAYS_OUT:
        sys.exit(f"{reason}: say in WAYS_OUT of {Path(__file__).name} what to do about it")
    return cell(WAYS_OUT[reason])


def reasons() -> set[str]:
    """Every reason that there is."""
    ours = {cause.value.reason for cause in Cause} - {"{reason}"}
    told = {reason for module in (status, scaling) for reason, _ in literal_reasons(module)}
    return ours | told | set(refusals())


def conditions() -> str:
    """The whole of docs/conditions.md."""
    lines = [CONDITIONS_HEAD, "## Ready, and Progressing with it", ""]
    lines += ["The gravest first: of several causes the first is told.", ""]
    lines += ["| reason | Ready | message | what to do |", "|---|---|---|---|"]
    for cause in Cause:
        row = cause.value
        if row.reason == "{reason}":
            lines.append(f"| the engine's own, below | {row.ready} | the engine's own words | below |")
        else:
            lines.append(f"| {row.reason} | {row.ready} | {cell(row.message)} | {way_out(row.reason)} |")
    lines += ["", "## Refusals of the engine", ""]
    lines += ["Ready is False. The engine, or `octavo pull`, has ended and left these in its termination message.", ""]
    lines += ["| reason | meaning | what to do |", "|---|---|---|"]
    lines += [f"| {reason} | {cell(meaning)} | {way_out(reason)} |" for reason, meaning in refusals().items()]
    lines += ["", "## Available, UpdateAvailable, Autoscaling", ""]
    lines += ["| reason | status | what to do |", "|---|---|---|"]
    for module in (status, scaling):
        lines += [f"| {reason} | {told} | {way_out(reason)} |" for reason, told in literal_reasons(module)]
    return "\n".join(lines) + "\n"


def resource() -> str:
    """The whole of docs/resource.md."""
    (version,) = custom_resource_definition()["spec"]["versions"]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    lines = [FIELDS_HEAD]
    for part, title in (("spec", "What users write"), ("status", "What the operator writes")):
        lines += [f"## {part}", "", f"{title}.", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        lines += list(rows(part, properties[part]))
        lines.append("")
        rules = list(rules_of(part, properties[part]))
        if rules:
            lines += ["Rules:", "", *rules, ""]
    return "\n".join(lines)


def measured() -> str:
    """The whole of docs/metrics.md."""
    lines = [METRICS_HEAD, "| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]:
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines.append(metric_row(name, family.type, metric._labelnames, family.documentation))  # noqa: SLF001 - no public way
    lines += [
        metric_row(family.name, family.type, family._labelnames, family.documentation)  # noqa: SLF001 - as above
        for family in metrics.READINESS.collect()
    ]
    return "\n".join(lines) + "\n"


def metric_row(name: str, kind_: str, labels: Iterable[str], meaning: str) -> str:
    """A line of the table of metrics."""
    return f"| `{name}` | {kind_} | {', '.join(labels)} | {cell(meaning)} |"


def rows(path: str, schema: dict[str, Any]) -> Iterator[str]:
    """A line for each field below a schema."""
    for name, child in schema.get("properties", {}).items():
        place = f"{path}.{name}"
        needed = ", required" if name in schema.get("required", ()) else ""
        default = f"`{child['default']}`" if "default" in child and "properties" not in child else ""
        yield f"| `{place}` | {kind(child)}{needed} | {default} | {cell(child.get('description', ''))} |"
        yield from rows(place, child)
        if "items" in child:
            yield from rows(f"{place}[]", child["items"])


def kind(schema: dict[str, Any]) -> str:
    """The type of a field, with its bounds."""
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "items" in schema:
        return f"list of {kind(schema['items'])}, up to {schema['maxItems']}"
    if "additionalProperties" in schema:
        return f"map to {kind(schema['additionalProperties'])}, up to {schema['maxProperties']}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if high is not None:
        return f"{schema['type']}, {low} to {high}"
    return f"{schema['type']}, from {low}" if low is not None else str(schema.get("type", "anything"))


def rules_of(path: str, schema: dict[str, Any]) -> Iterator[str]:
    """A line for each rule of a schema and of what is within."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield f"- `{path}`: {rule['message']}."
    for name, child in schema.get("properties", {}).items():
        yield from rules_of(f"{path}.{name}", child)
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from rules_of(f"{path}[]", schema[keyword])


def main() -> None:
    """Write or compare; 1 when a page is out of date."""
    arguments = argparse.ArgumentParser(description="Writes docs/conditions.md, resource.md and metrics.md.")
    arguments.add_argument("--check", action="store_true", help="only compare")
    check = arguments.parse_args().check
    if stale := WAYS_OUT.keys() - reasons():
        sys.exit(f"WAYS_OUT of {Path(__file__).name} has reasons that there are not: {', '.join(sorted(stale))}")
    for name, text in (("conditions.md", conditions()), ("resource.md", resource()), ("metrics.md", measured())):
        page = FOLDER / name
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is out of date: run {COMMAND}")


if __name__ == "__main__":
    main()
