"""The operator's settings: one frozen object, read from the command line by `__main__`.

The Helm chart renders exactly the flags below; nothing is read from the environment but what every Kubernetes
client reads to find its API server (the service account of the pod, else KUBECONFIG). Constants that follow from
the design (timeouts, rates, numbers of workers) stand in the modules that use them: they are no settings.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from octavo_operator import __version__
from octavo_operator.resources import Key

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one operator process was told."""

    engine_image: str  # the image of the engine's containers, unless spec.engine.image names another
    namespaces: tuple[str, ...] = ()  # the namespaces served; empty means all of them
    prometheus_url: str | None = None  # that KEDA asks for every metric but cpu
    lease: Key | None = None  # only its holder writes; None: this operator is the only one
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    health_port: int = 8080  # GET /healthz: 200 while every watch makes progress, else 500
    metrics_port: int = 9090  # GET /metrics, in Prometheus' text format

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> "Settings":
        """Parse the command line (`sys.argv` by default); argparse exits with status 2 and a sentence on a bad one."""
        parser = _parser()
        parsed = parser.parse_args(arguments)
        if parsed.health_port == parsed.metrics_port:
            parser.error(f"--health-port and --metrics-port are both {parsed.health_port}; they must differ")
        return cls(
            engine_image=parsed.engine_image,
            namespaces=tuple(dict.fromkeys(parsed.namespace)),
            prometheus_url=parsed.prometheus_url,
            lease=parsed.lease,
            log_level=parsed.log_level,
            log_format=parsed.log_format,
            health_port=parsed.health_port,
            metrics_port=parsed.metrics_port,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo-operator",
        description="Turns InferenceServices into Deployments, Services and HorizontalPodAutoscalers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"octavo-operator {__version__}")
    parser.add_argument(
        "--engine-image",
        required=True,
        type=_not_empty,
        metavar="IMAGE",
        help="image of the engine's containers; spec.engine.image of an InferenceService goes before it",
    )
    parser.add_argument(
        "--namespace",
        action="append",
        default=[],
        type=_not_empty,
        metavar="NAME",
        help="serve this namespace only; may be given several times; without it all namespaces are served",
    )
    parser.add_argument(
        "--prometheus-url",
        type=http_url,
        metavar="URL",
        help="where KEDA reaches the Prometheus that has the engines' metrics; without it KEDA scales by cpu only",
    )
    parser.add_argument(
        "--lease",
        type=_lease,
        metavar="NAMESPACE/NAME",
        help="of several operators with the same Lease one writes; without it this one must be the only one",
    )
    parser.add_argument("--log-level", choices=get_args(LogLevel), default="info", help="default: %(default)s")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text", help="default: %(default)s")
    parser.add_argument(
        "--health-port", type=_port, default=8080, metavar="PORT", help="serves GET /healthz; default: %(default)s"
    )
    parser.add_argument(
        "--metrics-port", type=_port, default=9090, metavar="PORT", help="serves GET /metrics; default: %(default)s"
    )
    return parser


def _not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _lease(text: str) -> Key:
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a namespace and a name such as octavo-system/octavo")
    return Key(*text.split("/"))


def http_url(text: str) -> str:
    """An address of a web server, as an argument."""
    if re.fullmatch(r"https?://[^\s/]+(?:/\S*)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://prometheus.monitoring.svc:9090")
    return text


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a TCP port (1 to 65535)")
    return port
