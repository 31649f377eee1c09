"""`kubectl octavo`: what a person asks about InferenceServices without the operator's help.

The script `kubectl-octavo`, which kubectl finds on PATH. Knows the types and the builders; imports no client and no
kopf, so that it answers at once, and asks a cluster by kubectl itself.
"""

import argparse
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from octavo_operator import __version__, names, yaml_text
from octavo_operator.api.base import explain
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import children
from octavo_operator.errors import SpecInvalid
from octavo_operator.kubectl import Kubectl, KubectlFailed
from octavo_operator.preview import Operator, preview
from octavo_operator.report import report
from octavo_operator.resources import OPTIONAL
from octavo_operator.settings import http_url


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(options.answer(options))
    except (SpecInvalid, KubectlFailed, OSError) as error:
        sys.stderr.write(f"kubectl octavo {options.command}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubectl octavo", description="Looks at InferenceServices with the operator's eyes.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kubectl-octavo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_render(commands)
    _add_plan(commands)
    _add_status(commands)
    return parser


def _add_render(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "render",
        help="print the objects that the operator would apply",
        description="Prints the objects that the operator would apply for the InferenceServices in a file. "
        "Nothing is sent to a cluster.",
        allow_abbrev=False,
    )
    command.add_argument("-f", "--filename", required=True, metavar="FILE", help="a YAML file; - is standard input")
    command.add_argument(
        "--engine-image",
        default=names.DEFAULT_ENGINE_IMAGE,
        metavar="IMAGE",
        help="the image for services that name none; default: %(default)s",
    )
    command.add_argument(
        "--with",
        dest="offered",
        action="append",
        default=[],
        choices=list(OPTIONAL),
        help="suppose that the cluster has this kind; may be given several times",
    )
    command.add_argument(
        "--prometheus-url", type=http_url, metavar="URL", help="suppose that the operator was told of this Prometheus"
    )
    command.set_defaults(
        answer=lambda options: render(
            options.filename,
            engine_image=options.engine_image,
            offered=options.offered,
            prometheus_url=options.prometheus_url,
        )
    )


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "status",
        help="print all that is known of an InferenceService",
        description="Prints what the operator tells of an InferenceService, its pods and its events.",
        allow_abbrev=False,
    )
    command.add_argument("name", metavar="NAME", help="the InferenceService")
    _add_cluster(command)
    command.set_defaults(answer=lambda options: describe(options.name, options.namespace, options.context))


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "plan",
        help="print what would change on the cluster if a file were applied",
        description="Prints what would change on the cluster if the InferenceServices in a file were applied: each "
        "child, by its fields, and whether pods are replaced. The API server judges it by dry runs; nothing is stored.",
        allow_abbrev=False,
    )
    command.add_argument("-f", "--filename", required=True, metavar="FILE", help="a YAML file; - is standard input")
    _add_cluster(command)
    command.add_argument(
        "--engine-image",
        metavar="IMAGE",
        help="the operator's default image; default: what the operator's Deployment says, or else the running one",
    )
    command.add_argument(
        "--prometheus-url", type=http_url, metavar="URL", help="beside --engine-image: what the operator was told"
    )
    command.set_defaults(
        answer=lambda options: plan(
            options.filename,
            options.namespace,
            options.context,
            Operator(options.engine_image, options.prometheus_url) if options.engine_image is not None else None,
        )
    )


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", "--namespace", metavar="NAMESPACE", help="default: that of the current context")
    command.add_argument("--context", metavar="CONTEXT", help="of the kubeconfig; default: the current one")


def describe(name: str, namespace: str | None, context: str | None) -> str:
    """What a cluster has of an InferenceService, for people.

    Raises:
        KubectlFailed: there is no such service, or kubectl could not ask.
        OSError: there is no kubectl.
    """
    kubectl = Kubectl(context, namespace)
    service = kubectl.get(f"{names.PLURAL}.{names.GROUP}", name)
    metadata = service["metadata"]
    kubectl = kubectl.within(metadata["namespace"])
    pods = kubectl.get("pods", f"--selector={names.selector_text(name)}")["items"]
    about = f"--field-selector=involvedObject.uid={metadata['uid']}"
    events = kubectl.get("events", about, "--sort-by=.metadata.creationTimestamp")["items"]
    return report(service, pods, events)


def plan(filename: str, namespace: str | None, context: str | None, operator: Operator | None) -> str:
    """What would change on a cluster if the InferenceServices in a file were applied.

    Raises:
        SpecInvalid: the file is not YAML or holds no InferenceService.
        KubectlFailed: the API server refuses one, or does not let the user ask.
        OSError: the file cannot be read, or there is no kubectl.
    """
    kubectl = Kubectl(context, namespace)
    return "\n".join(preview(kubectl, document, operator) for document in _services(filename))


def render(
    filename: str, *, engine_image: str, offered: Collection[str] = (), prometheus_url: str | None = None
) -> str:
    """The children of every InferenceService in a file, as YAML. Other objects are named on standard error.

    Raises:
        SpecInvalid: the file is not YAML, holds no InferenceService, or holds one that the API server would refuse.
        OSError: the file cannot be read.
    """
    manifests = [
        manifest
        for document in _services(filename)
        for manifest in children(
            read(document), engine_image=engine_image, offered=offered, prometheus_url=prometheus_url
        )
    ]
    return yaml_text.dump(manifests)


def read(document: dict[str, Any]) -> InferenceService:
    """An InferenceService from a manifest, checked as strictly as `kubectl apply` does.

    Raises:
        SpecInvalid: with one line for each field that is wrong.
    """
    document = {key: value for key, value in document.items() if key != "status"}  # never the user's to write
    try:
        return InferenceService.model_validate(document, extra="forbid")
    except ValidationError as error:
        metadata = document.get("metadata")
        name = metadata.get("name", "") if isinstance(metadata, dict) else ""
        lines = "".join(f"\n  {line}" for line in explain(error))
        raise SpecInvalid(f'the InferenceService "{name}" is invalid:{lines}') from error


def _services(filename: str) -> list[dict[str, Any]]:
    """The InferenceServices in a file, at least one."""
    text = sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
    found = list(_documents(text, filename))
    if not found:
        raise SpecInvalid(f"{filename} holds no {names.KIND} of {names.API_VERSION}")
    return found


def _documents(text: str, filename: str) -> Iterator[dict[str, Any]]:
    """The InferenceServices among the YAML documents, also those in a List."""
    try:
        pending = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise SpecInvalid(f"{filename} is not YAML: {error}") from error
    while pending:
        document = pending.pop(0)
        if document is None:
            continue
        if not isinstance(document, dict) or "kind" not in document:
            raise SpecInvalid(f"{filename} holds something that is not a Kubernetes object: it has no kind")
        api_version, kind = document.get("apiVersion"), document["kind"]
        if kind == "List":
            pending[:0] = document.get("items") or []
        elif kind == names.KIND and str(api_version).startswith(f"{names.GROUP}/"):
            yield document
        else:
            sys.stderr.write(f"kubectl octavo render: skipped a {kind} of {api_version}\n")


if __name__ == "__main__":
    sys.exit(main())
