"""The `octavo` command: reads the command line, hands a frozen configuration to what does the work, tells how it went.

Flags are named as vLLM's where vLLM has them. What a command needs is imported when it runs, so that `octavo --version`
and a mistyped flag cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import octavo_engine
from octavo_engine.config import Device, DType, EngineConfig, ServerConfig
from octavo_engine.errors import ConfigError, EngineDead, EngineRefused, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from octavo_engine.store.local import Location
    from octavo_engine.store.pull import Hub

# ruff: noqa: PLC0415 - commands import what they need when they run; the module docstring tells why
# ruff: noqa: T201 - printing is what this is for

_MAX_TERMINATION_BYTES: Final = 4096  # what Kubernetes keeps of a termination message
_MODEL_HELP: Final = (
    "a .gguf file, a name from `octavo list`, a short name (smollm2), "
    "hf://ORG/REPO[@REVISION]:FILE.gguf or https://.../FILE.gguf; what is not here yet is pulled"
)
_ENVIRONMENT_HELP: Final = (
    "environment: HF_TOKEN, the Hugging Face hub's token for gated and private repositories; HF_ENDPOINT, "
    "the address of a mirror of the hub; XDG_CACHE_HOME, under which models are kept"
)


_DEFAULTS: Final = {field.name: field.default for config in (ServerConfig, EngineConfig) for field in fields(config)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 it could not be done, 2 the command line is wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it writes a line for each request
    try:
        options.command(options)
    except (UserError, EngineDead) as error:
        print(f"octavo: {error}", file=sys.stderr)
        if options.termination_log is not None:
            _write_termination_log(options.termination_log, error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# Commands


def _serve(options: argparse.Namespace) -> None:
    from octavo_engine.server.run import serve

    location = _locate(options.model)
    config = ServerConfig(
        engine=_engine_config(options, location, tuple(options.served_model_name or [location.name])),
        host=options.host,
        port=options.port,
        max_num_queued_reqs=options.max_num_queued_reqs,
        shutdown_timeout=options.shutdown_timeout,
        termination_log=options.termination_log,
    )
    serve(config, location, _hub(os.environ))


def _run(options: argparse.Namespace) -> None:
    from octavo_engine.terminal import Chat, converse, print_answer

    location = _locate(options.model)
    prompt = " ".join(options.prompt)
    if not sys.stdin.isatty():
        prompt = "\n\n".join(part for part in (prompt, sys.stdin.read().strip()) if part)
        if not prompt:
            raise ConfigError("there is no prompt: give one as an argument, or write it to standard input")
    _pull_if_missing(location)
    config = _engine_config(options, location, (location.name,))
    if sys.stderr.isatty():
        print(f"loading {location.name} ...", file=sys.stderr)
    with Chat(config, temperature=options.temperature, system=options.system) as chat:
        if prompt:
            print_answer(chat, prompt)
        else:
            converse(chat)


def _pull(options: argparse.Namespace) -> None:
    location = _locate(options.source)
    if location.source is None:
        raise ConfigError(f"{options.source} is on this machine already: {location.path}")
    if options.output is not None:
        output = options.output / location.path.name if options.output.is_dir() else options.output
        location = replace(location, path=output)
    _pull_if_missing(location)
    print(location.path)


def _list(_options: argparse.Namespace) -> None:
    from octavo_engine.store.local import list_models

    root = _store()
    models = list_models(root)
    if not models:
        print(f"no models in {root}; `octavo pull smollm2` brings one", file=sys.stderr)
        return
    width = max(len("NAME"), *(len(model.name) for model in models))
    print(f"{'NAME':{width}}  {'SIZE':>9}  MODIFIED")
    for model in models:
        modified = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.modified))
        print(f"{model.name:{width}}  {model.num_bytes / 1e6:6.0f} MB  {modified}")


def _rm(options: argparse.Namespace) -> None:
    from octavo_engine.store.local import remove

    for model in options.models:
        print(f"removed {remove(model, _store())}")


# From options to configuration


def _pull_if_missing(location: Location) -> None:
    from octavo_engine.store.progress import ProgressLine
    from octavo_engine.store.pull import pull

    if location.source is None or not location.is_missing:
        return
    progress = ProgressLine(location.path.name, sys.stderr)
    asyncio.run(
        pull(
            location.source,
            location.path,
            hub=_hub(os.environ),
            sha256=location.sha256,
            on_progress=progress.show,
        )
    )


def _locate(model: str) -> Location:
    from octavo_engine.store.local import locate

    return locate(model, _store())


def _store() -> Path:
    from octavo_engine.store.local import default_root

    return default_root(os.environ)


def _hub(environment: Mapping[str, str]) -> Hub:
    from octavo_engine.store.pull import Hub
    from octavo_engine.store.source import HUB

    return Hub(endpoint=environment.get("HF_ENDPOINT") or HUB, token=environment.get("HF_TOKEN") or None)


def _engine_config(options: argparse.Namespace, location: Location, names: tuple[str, ...]) -> EngineConfig:
    return EngineConfig(
        model=location.path,
        served_model_names=names,
        dtype=options.dtype,
        device=options.device,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="octavo", description="Serve large language models, or talk to one.")
    parser.add_argument("--version", action="version", version=f"octavo {octavo_engine.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    serve = commands.add_parser("serve", help="serve a model over HTTP", epilog=_ENVIRONMENT_HELP)
    serve.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_server_options(serve)
    _add_engine_options(serve)
    serve.set_defaults(command=_serve, log_level=logging.INFO)

    run = commands.add_parser("run", help="talk to a model on the terminal", epilog=_ENVIRONMENT_HELP)
    run.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    run.add_argument("prompt", metavar="PROMPT", nargs="*", help="answer this and leave; standard input is added to it")
    run.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    run.add_argument("--temperature", type=_between(0.0, 2.0), default=0.7, help="0: greedy (default: %(default)s)")
    _add_engine_options(run)
    run.set_defaults(command=_run, log_level=logging.WARNING, termination_log=None)

    pull = commands.add_parser("pull", help="fetch a model", epilog=_ENVIRONMENT_HELP)
    pull.add_argument(
        "source", metavar="SOURCE", help="a short name, hf://ORG/REPO[@REVISION]:FILE.gguf or https://..."
    )
    pull.add_argument("--output", type=Path, metavar="PATH", help="where to put it (default: the local store)")
    _add_termination_log(pull)
    pull.set_defaults(command=_pull, log_level=logging.WARNING)

    listing = commands.add_parser("list", help="list the models in the local store")
    listing.set_defaults(command=_list, log_level=logging.WARNING, termination_log=None)

    remove = commands.add_parser("rm", help="delete models from the local store")
    remove.add_argument("models", metavar="MODEL", nargs="+", help="a name from `octavo list`")
    remove.set_defaults(command=_rm, log_level=logging.WARNING, termination_log=None)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, which would break when an option is added, and options in any place.

    argparse on its own takes no PROMPT after an option (its documentation, "Intermixed parsing").
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)
        self._intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse intermixed; which itself parses options and positionals apart, by this method."""
        if self._intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=_DEFAULTS["host"], help="address to listen on (default: %(default)s)")
    group.add_argument(
        "--port", type=_whole(0, 65535), default=_DEFAULTS["port"], help="0: any free one (default: %(default)s)"
    )
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names that clients use (default: the model's own)"
    )
    group.add_argument(
        "--max-num-queued-reqs",
        type=_whole(0),
        metavar="N",
        help="requests that may wait; more are answered 503 (default: four times --max-num-seqs)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_between(0.0, 86400.0),
        default=_DEFAULTS["shutdown_timeout"],
        metavar="SECONDS",
        help="what running requests get to finish after SIGTERM (default: %(default)g)",
    )
    _add_termination_log(group)


def _add_termination_log(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--termination-log", type=Path, metavar="PATH", help="write the reason as JSON here if this command fails"
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    positive = _whole(1)
    group.add_argument(
        "--dtype", choices=get_args(DType), default=_DEFAULTS["dtype"], help="of computation and KV cache"
    )
    group.add_argument(
        "--device", choices=get_args(Device), default=_DEFAULTS["device"], help="an explicit one is never replaced"
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=_DEFAULTS["tensor_parallel_size"],
        metavar="N",
        help="ranks that share the model",
    )
    group.add_argument(
        "--max-model-len", type=positive, metavar="TOKENS", help="longest prompt and answer (default: fits)"
    )
    group.add_argument(
        "--max-num-seqs",
        type=positive,
        default=_DEFAULTS["max_num_seqs"],
        metavar="N",
        help="requests in one step (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        default=_DEFAULTS["max_num_batched_tokens"],
        metavar="TOKENS",
        help="tokens in one step (default: %(default)s)",
    )
    group.add_argument("--block-size", type=positive, metavar="TOKENS", help="of the KV cache (default: by device)")
    group.add_argument(
        "--kv-cache-memory-bytes", type=positive, metavar="BYTES", help="(default: a share of what is free)"
    )
    group.add_argument(
        "--seed", type=_whole(0, 2**63 - 1), default=_DEFAULTS["seed"], help="of sampling (default: %(default)s)"
    )


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range, whose message argparse puts behind the option's name."""

    def parse(text: str) -> int:
        number = int(text) if text.lstrip("-").isdecimal() else None
        if number is None or number < least or (most is not None and number > most):
            bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return number

    return parse


def _between(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return number

    return parse


def _write_termination_log(path: Path, error: UserError | EngineDead) -> None:
    """Tell the operator, in what Kubernetes keeps of a termination message."""
    reason = error.reason if isinstance(error, UserError) else type(error).__name__
    facts = error.facts if isinstance(error, EngineRefused) else {}
    message = str(error)
    while (
        len(body := json.dumps({"reason": reason, "message": message, "facts": facts}).encode())
        > _MAX_TERMINATION_BYTES
    ):
        message = message[: len(message) * 3 // 4]
    try:
        path.write_bytes(body)
    except OSError as cause:  # the reason itself is told already
        print(f"octavo: --termination-log {path}: {cause.strerror}", file=sys.stderr)
