"""The `octavo` command: hands a frozen configuration to what does the work, and tells how it went.

arguments.py reads the command line. What a command needs is imported when it runs, so that `octavo --version` and a
mistyped flag cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from octavo_engine import logs
from octavo_engine.arguments import build_parser
from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.errors import ConfigError, EngineDead, ModelfileInvalid, SourceUnreachable, UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from octavo_engine.modelfile import Modelfile
    from octavo_engine.parameters import Parameters
    from octavo_engine.planning import Model
    from octavo_engine.store.local import Location
    from octavo_engine.store.pull import Hub

# ruff: noqa: PLC0415 - commands import what they need when they run; the module docstring tells why
# ruff: noqa: T201 - printing is what this is for

_MAX_TERMINATION_BYTES: Final = 4096  # what Kubernetes keeps of a termination message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 it could not be done, 2 the command line is wrong."""
    options = build_parser(_COMMANDS).parse_args(arguments)
    logs.configure(options.log_level, getattr(options, "log_format", "text"))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it writes a line for each request
    try:
        options.command(options)
    except (UserError, EngineDead) as error:
        print(f"octavo: {error}", file=sys.stderr)
        if options.termination_log is not None:
            _write_termination_log(options.termination_log, _told(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# Commands


def _serve(options: argparse.Namespace) -> None:
    from octavo_engine import transport

    location = _locate(options.model, options.revision)
    config = ServerConfig(
        engine=_engine_config(options, location, tuple(options.served_model_name or [location.name])),
        host=options.host,
        port=options.port,
        max_num_queued_reqs=options.max_num_queued_reqs,
        scheduling_policy=options.scheduling_policy,
        shutdown_timeout=options.shutdown_timeout,
        termination_log=options.termination_log,
        api_key=tuple(options.api_key),
        api_key_file=options.api_key_file,
        api_key_for_all=options.api_key_for_all,
        allowed_origins=options.allowed_origins,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
        old_metrics=options.old_metrics,
        chat_template=options.chat_template,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
    )
    # The engine's imports take seconds, and so do those of the server: they run beside each other.
    started = None if location.is_missing else transport.spawn(config.engine)
    from octavo_engine.server.run import serve

    serve(config, location, _hub(os.environ), started)


def _run(options: argparse.Namespace) -> None:
    from octavo_engine.modelfile import Modelfile
    from octavo_engine.terminal import Chat, converse, print_answer

    location = _locate(options.model, options.revision)
    prompt = " ".join(options.prompt)
    if not sys.stdin.isatty():
        prompt = "\n\n".join(part for part in (prompt, sys.stdin.read().strip()) if part)
        if not prompt:
            raise ConfigError("there is no prompt: give one as an argument, or write it to standard input")
    _pull_if_missing(location)
    config = _engine_config(options, location, (location.name,))
    if sys.stderr.isatty():
        print(f"loading {location.name} ...", file=sys.stderr)
    parameters: Parameters = {} if options.temperature is None else {"temperature": options.temperature}
    told = Modelfile(source=location.name, system=options.system or "", parameters=parameters)
    with Chat(config, told.over(_modelfile_of(location))) as chat:
        if prompt:
            print_answer(chat, prompt)
        else:
            converse(chat)


def _plan(options: argparse.Namespace) -> None:
    from octavo_engine.planning import plan_for_cpu, plan_for_gpus

    if options.gpus is not None and options.gpu_memory is None:
        raise ConfigError(f"--gpus {options.gpus} says nothing without --gpu-memory, such as --gpu-memory 80GiB")
    location = _locate(options.model, options.revision)
    config = replace(_engine_config(options, location, (location.name,)), tensor_parallel_size=options.gpus or 1)
    model = _read_model(location)
    try:
        if options.gpu_memory is None:
            plan = plan_for_cpu(model, config, processes=(os.getpid(),))
        else:
            plan = plan_for_gpus(model, config, gpu_memory=options.gpu_memory)
    except UserError as error:
        if options.json:
            print(json.dumps(_told(error)))
        raise
    print(json.dumps(plan.facts()) if options.json else plan.describe())


def _pull(options: argparse.Namespace) -> None:
    location = _locate(options.source, options.revision)
    if location.source is None:
        raise ConfigError(f"{options.source} is on this machine already: {location.path}")
    if options.output is not None:
        output = options.output / location.path.name if options.output.is_dir() else options.output
        location = replace(location, path=output)
    with contextlib.suppress(SourceUnreachable):  # the pull itself tries again and again
        _read_model(location)  # what this engine cannot run is not worth its download
    _pull_if_missing(location)
    model = _read_model(location)
    print(location.path)
    if options.termination_log is not None:
        told = {"reason": "Pulled", "message": f"{location.name} is at {location.path}", "facts": model.facts()}
        _write_termination_log(options.termination_log, told)


def _create(options: argparse.Namespace) -> None:
    from octavo_engine.modelfile import parse_modelfile
    from octavo_engine.store import derived
    from octavo_engine.store.local import locate

    try:
        modelfile = parse_modelfile(options.file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {options.file}: {error}") from error
    except ModelfileInvalid as error:
        raise ModelfileInvalid(f"{options.file}: {error}") from error
    beside = options.file.resolve().parent / modelfile.source
    location = locate(str(beside) if beside.exists() else modelfile.source, _store())
    path = derived.save(options.name, modelfile.over(_modelfile_of(location)), _store())
    print(f"created {options.name} ({path})")


def _show(options: argparse.Namespace) -> None:
    location = _locate(options.model, options.revision)
    modelfile = _modelfile_of(location)
    if options.modelfile:
        print(modelfile.render(), end="")
        return
    rows = [(name, str(value)) for name, value in _read_model(location).facts().items()]
    for title, lines in (("Model", rows), ("Parameters", modelfile.parameter_lines())):
        if lines:
            print(title, *(f"  {name:20}  {value}" for name, value in lines), sep="\n")
    if modelfile.system:
        print(f"System\n  {modelfile.system}")


def _cp(options: argparse.Namespace) -> None:
    from octavo_engine.store import derived

    derived.save(options.destination, _modelfile_of(_locate(options.model, None)), _store())
    print(f"copied {options.model} to {options.destination}")


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


def _modelfile_of(location: Location) -> Modelfile:
    """The model's Modelfile; of one without, that which makes the model of itself."""
    from octavo_engine.modelfile import Modelfile

    source = location.source.text if location.source is not None else str(location.path.resolve())
    return location.modelfile or Modelfile(source=source)


def _read_model(location: Location) -> Model:
    """What the model's header tells, which is fetched alone where the model is not here yet."""
    from octavo_engine.planning import read_model

    if location.source is None or not location.is_missing:
        return read_model(location.path)
    from octavo_engine.store.header import fetch_header

    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        return read_model(asyncio.run(fetch_header(location.source, Path(folder), hub=_hub(os.environ))))


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


def _locate(model: str, revision: str | None) -> Location:
    from octavo_engine.store.local import locate
    from octavo_engine.store.source import at_revision

    return locate(at_revision(model, revision) if revision is not None else model, _store())


def _store() -> Path:
    from octavo_engine.store.local import default_root

    return default_root(os.environ)


def _hub(environment: Mapping[str, str]) -> Hub:
    from octavo_engine.store.pull import Hub
    from octavo_engine.store.source import HUB

    return Hub(endpoint=environment.get("HF_ENDPOINT") or HUB, token=environment.get("HF_TOKEN") or None)


def _engine_config(options: argparse.Namespace, location: Location, names: tuple[str, ...]) -> EngineConfig:
    """Every option of the engine is a field of its configuration, under the same name."""
    given = {field.name: getattr(options, field.name) for field in fields(EngineConfig) if field.name in options}
    context = location.modelfile.parameters.get("num_ctx") if location.modelfile is not None else None
    if given.get("max_model_len") is None and context is not None:
        given["max_model_len"] = context
    return EngineConfig(**(given | {"model": location.path, "served_model_names": names}))


def _told(error: UserError | EngineDead) -> dict[str, Any]:
    """What went wrong, as the termination log has it."""
    if isinstance(error, UserError):
        return {"reason": error.reason, "message": str(error), "facts": error.facts}
    return {"reason": type(error).__name__, "message": str(error), "facts": {}}


def _write_termination_log(path: Path, told: dict[str, Any]) -> None:
    """Tell the operator, in what Kubernetes keeps of a termination message."""
    while len(body := json.dumps(told).encode()) > _MAX_TERMINATION_BYTES:
        told = told | {"message": told["message"][: len(told["message"]) * 3 // 4]}
    try:
        path.write_bytes(body)
    except OSError as cause:  # the reason itself is told already
        print(f"octavo: --termination-log {path}: {cause.strerror}", file=sys.stderr)


_COMMANDS: Final = {
    "serve": _serve,
    "run": _run,
    "plan": _plan,
    "pull": _pull,
    "create": _create,
    "show": _show,
    "list": _list,
    "cp": _cp,
    "rm": _rm,
}
