"""The options of `octavo serve` alone: where it listens, who may ask, what it writes, LoRA. Called by arguments.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from octavo_engine.argument_values import (
    API_KEY_VARIABLE,
    DEFAULTS,
    api_key,
    between,
    lora_module,
    origins,
    whole,
)
from octavo_engine.config import LogFormat, SchedulingPolicy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

# Where a server of many models listens, which is a laptop's: Ollama's address.
LOCAL_ADDRESS: Final[Mapping[str, str | int]] = {"host": "127.0.0.1", "port": 11434}


def add_termination_log(parser: argparse._ActionsContainer) -> None:
    """Add what every command has that runs in a pod."""
    parser.add_argument(
        "--termination-log",
        type=Path,
        metavar="PATH",
        help="write here, as JSON, why this command failed and what is known of the model (default: nowhere)",
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add what a server is and how it works."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", help=f"address to listen on (default: {DEFAULTS['host']}; without MODEL {LOCAL_ADDRESS['host']})"
    )
    group.add_argument(
        "--port",
        type=whole(0, 65535),
        help=f"0: any free one (default: {DEFAULTS['port']}; without MODEL {LOCAL_ADDRESS['port']}, as Ollama)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that clients use; responses carry the first (default: the model's own)",
    )
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="PATH",
        help="write prompts of chats as this file's jinja2 template does (default: as the model's own does)",
    )
    group.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default=DEFAULTS["log_format"],
        help="of what is written to standard error; json: one object a line (default: %(default)s)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send traces of requests to this collector by OTLP, such as http://localhost:4318/v1/traces; needs "
        "octavo[otel] (default: no traces)",
    )
    group.add_argument(
        "--old-metrics",
        action="store_true",
        help="/metrics has the names that vLLM gave up too, for dashboards that ask for them (default: off)",
    )
    group.add_argument(
        "--profiles",
        type=Path,
        metavar="PATH",
        help="serve MODEL under further names too, each with a system message, parameters, a template and messages of "
        "its own, as this JSON or YAML file lists them; it is read again when it changes (default: none)",
    )
    group.add_argument(
        "--max-num-queued-reqs",
        type=whole(0),
        metavar="N",
        help="requests that may wait; more are answered 503 (default: four times --max-num-seqs)",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=get_args(SchedulingPolicy),
        default=DEFAULTS["scheduling_policy"],
        help="who goes first; fcfs: who came first; priority: who has the lower `priority` in the request (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=between(0.0, 86400.0),
        default=DEFAULTS["shutdown_timeout"],
        metavar="SECONDS",
        help="what running requests get to finish after SIGTERM (default: %(default)g seconds)",
    )
    add_termination_log(group)


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Add who may ask it, and by what connections."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        type=api_key,
        default=[],
        metavar="KEY",
        help="accept this key, and no request without one; may be given several times; others on this machine can see "
        f"it, but not keys in the environment's {API_KEY_VARIABLE} (default: none is needed)",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="PATH",
        help="accept the keys in this file too, one a line; it is read again when it changes (default: none)",
    )
    group.add_argument(
        "--api-key-for-all",
        action="store_true",
        help="/health, /ready, /metrics and /version need a key too (default: they stay open)",
    )
    group.add_argument(
        "--allowed-origins",
        type=origins,
        default=(),
        metavar="JSON",
        help='web pages that may call this server (CORS), as a JSON list of their origins; ["*"]: any (default: none)',
    )
    for name, what in (
        ("certfile", "PEM file with the certificate for HTTPS and its chain (default: HTTP)"),
        ("keyfile", "PEM file with the certificate's private key (default: it is in --ssl-certfile)"),
        (
            "ca-certs",
            "PEM file with authorities; clients must have a certificate of one (default: none needed)",
        ),
    ):
        group.add_argument(f"--ssl-{name}", type=Path, metavar="PATH", help=what)


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    """Add what adapters are served beside the model."""
    group = parser.add_argument_group("LoRA adapters")
    group.add_argument(
        "--enable-lora",
        action="store_true",
        help="serve adapters beside MODEL, each a model with a name of its own; POST /v1/load_lora_adapter brings "
        "further ones (default: off)",
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        type=lora_module,
        default=DEFAULTS["lora_modules"],
        metavar="NAME=PATH",
        help="adapters to begin with, each a folder as PEFT writes it or a GGUF file (default: none)",
    )
    group.add_argument(
        "--max-loras",
        type=whole(1),
        metavar="N",
        help="adapters that may be loaded at once; memory is kept for them (default: those of --lora-modules, at least "
        "1)",
    )
    group.add_argument(
        "--max-lora-rank",
        type=whole(1, 4096),
        default=DEFAULTS["max_lora_rank"],
        metavar="N",
        help="highest rank of an adapter (default: %(default)s)",
    )
