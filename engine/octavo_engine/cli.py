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
from octavo_engine.argument_values import API_KEY_VARIABLE, api_keys_of_environment
from octavo_engine.arguments import build_parser
from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.errors import (
    ConfigError,
    EngineDead,
    ModelfileInvalid,
    ModelNotFound,
    SourceForbidden,
    SourceUnreachable,
    UserError,
)
from octavo_engine.server_arguments import LOCAL_ADDRESS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from octavo_engine.parameters import Parameters
    from octavo_engine.planning import Model
    from octavo_engine.store.local import Location
    from octavo_engine.store.remote import Hub, Progress

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
    if options.model is None:
        from octavo_engine.server.run import serve_many

        for name in ("served_model_name", "revision", "tokenizer", "profiles", "enable_lora", "lora_modules"):
            if getattr(options, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for one model: give it, or leave the option out")
        if options.speculative_config is not None and options.speculative_config.model is not None:
            raise ConfigError("--speculative-config: 'model' is for one model: give it, or use the method \"ngram\"")
        engine = EngineConfig(**(_engine_options(options) | {"model": _store(), "served_model_names": ()}))
        serve_many(_server_config(options, engine, LOCAL_ADDRESS), _store(), _hub(os.environ))
        return
    from octavo_engine import transport

    location = _locate(options.model, options.revision)
    engine = _engine_config(options, location, tuple(options.served_model_name or [location.name]))
    config = _server_config(options, engine, {})
    # The engine's imports take seconds, and so do those of the server: they run beside each other.
    started = None if location.is_missing else transport.spawn(engine)
    from octavo_engine.server.run import serve

    serve(config, location, _hub(os.environ), started)


def _server_config(options: argparse.Namespace, engine: EngineConfig, address: Mapping[str, str | int]) -> ServerConfig:
    """The options of the server; `address` is where it listens unless they say otherwise."""
    given = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    listening: dict[str, Any] = {**address, **given}
    return ServerConfig(
        **listening,
        engine=engine,
        profiles=options.profiles,
        max_num_queued_reqs=options.max_num_queued_reqs,
        scheduling_policy=options.scheduling_policy,
        shutdown_timeout=options.shutdown_timeout,
        termination_log=options.termination_log,
        api_key=(*options.api_key, *api_keys_of_environment(os.environ)),
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


def _run(options: argparse.Namespace) -> None:
    from octavo_engine.modelfile import Modelfile
    from octavo_engine.terminal import Chat, converse, print_answer

    location = _locate(options.model, options.revision)
    prompt = " ".join(options.prompt)
    if not sys.stdin.isatty():
        prompt = "\n\n".join(part for part in (prompt, sys.stdin.read().strip()) if part)
        if not prompt:
            raise ConfigError("there is no prompt: give one as an argument, or write it to standard input")
    location = _pull_if_missing(location)
    config = _engine_config(options, location, (location.name,))
    if sys.stderr.isatty():
        print(f"loading {location.name} ...", file=sys.stderr)
    parameters: Parameters = {} if options.temperature is None else {"temperature": options.temperature}
    told = Modelfile(source=location.name, system=options.system or "", parameters=parameters)
    with Chat(config, told.over(location.own_modelfile())) as chat:
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
    from octavo_engine.store.pull import is_pulled
    from octavo_engine.store.waiting import telling

    location = _locate(options.source, options.revision)
    if location.source is None:
        raise ConfigError(f"{options.source} is on this machine already: {location.path}")
    if options.adapter and options.output is None:
        raise ConfigError("--adapter: name its place by --output; the local store is for models")
    if options.output is not None:
        output = options.output
        if output.is_dir() and not is_pulled(output, location.source):
            output /= location.path.name
        location = replace(location, path=output, store=None)
    with telling(options.host, options.port) as server:
        if not options.adapter:  # an adapter is judged beside its model: by `octavo serve`
            with contextlib.suppress(SourceUnreachable):  # the pull itself tries again and again
                _read_model(location)  # what this engine cannot run is not worth its download
        location = _pull_if_missing(location, server.tell)
    facts = {} if options.adapter else _read_model(location).facts()
    print(location.path)
    if options.termination_log is not None:
        told = {"reason": "Pulled", "message": f"{location.name} is at {location.path}", "facts": facts}
        _write_termination_log(options.termination_log, told)


def _push(options: argparse.Namespace) -> None:
    from octavo_engine.server.ollama.describe import describe
    from octavo_engine.store.local import locate
    from octavo_engine.store.progress import ProgressLine
    from octavo_engine.store.upload import destination, upload

    location = locate(options.model, _store(), names_only=True)
    if location.is_missing:
        raise ModelNotFound(f"there is no model {options.model} here; `octavo cp` gives one the name of its registry")
    source = destination(options.model, location)
    line = ProgressLine(options.model, sys.stderr)
    asyncio.run(upload(source, location, describe(location.model).details, on_progress=line.show))
    print(f"pushed to {source.text}")


def _create(options: argparse.Namespace) -> None:
    from octavo_engine.modelfile import parse_modelfile
    from octavo_engine.models.adapter import read_adapter
    from octavo_engine.store import derived
    from octavo_engine.store.local import locate

    derived.path_of(options.name, _store())  # a name that cannot be is told before anything is fetched
    try:
        modelfile = parse_modelfile(options.file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {options.file}: {error}") from error
    except ModelfileInvalid as error:
        raise ModelfileInvalid(f"{options.file}: {error}") from error
    beside = options.file.resolve().parent / modelfile.source
    location = _pull_if_missing(locate(str(beside) if beside.exists() else modelfile.source, _store()))
    if modelfile.adapter:
        modelfile = replace(modelfile, adapter=str(options.file.resolve().parent / modelfile.adapter))
        read_adapter(Path(modelfile.adapter), _read_model(location).spec)  # what is wrong with it is told now
    path = derived.save(options.name, modelfile.over(location.own_modelfile()), _store())
    print(f"created {options.name} ({path})")


def _show(options: argparse.Namespace) -> None:
    location = _locate(options.model, options.revision)
    modelfile = location.own_modelfile()
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

    location = _locate(options.model, None)
    if location.is_missing:
        raise ModelNotFound(f"{options.model} is not in the local store; `octavo list` shows what is")
    derived.save(options.destination, location.own_modelfile(), _store())
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


def _ps(options: argparse.Namespace) -> None:
    import httpx

    keys = [options.api_key] if options.api_key is not None else api_keys_of_environment(os.environ)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        answer = httpx.get(f"{options.url.rstrip('/')}/api/ps", headers=headers)
        models = None if answer.status_code == 401 else answer.raise_for_status().json()["models"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise SourceUnreachable(f"--url {options.url}: {error}; `octavo serve` starts a server") from error
    if models is None:
        raise SourceForbidden(f"--url {options.url} wants a key: give --api-key, or {API_KEY_VARIABLE}")
    width = max([len("NAME"), *(len(model["name"]) for model in models)])
    print(f"{'NAME':{width}}  {'SIZE':>9}  {'CONTEXT':>9}  UNTIL")
    for model in models:
        until = "for ever" if model["expires_at"].startswith("9999") else model["expires_at"][:19].replace("T", " ")
        size = f"{model['size'] / 1e6:.0f} MB"
        print(f"{model['name']:{width}}  {size:>9}  {model['context_length']:9,}  {until}")


def _completion(options: argparse.Namespace) -> None:
    from octavo_engine.completion import script

    print(script(options.shell, build_parser(_COMMANDS)), end="")


# From options to configuration


def _read_model(location: Location) -> Model:
    """What the model's header tells, which is fetched alone where the model is not here yet."""
    from octavo_engine.planning import read_model

    if location.source is None or not location.is_missing:
        return read_model(location.model)
    from octavo_engine.store.header import fetch_headers

    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        return read_model(asyncio.run(fetch_headers(location.source, Path(folder), hub=_hub(os.environ))))


def _pull_if_missing(location: Location, also: Progress = lambda _done, _total: None) -> Location:
    """Pull the model if it is not here; return where it is, with what came along. `also` is told how far it is."""
    from octavo_engine.store.progress import ProgressLine
    from octavo_engine.store.pull import pull

    if location.source is None or not location.is_missing:
        return location
    line = ProgressLine(location.name, sys.stderr)

    def show(done: int, total: int | None) -> None:
        line.show(done, total)
        also(done, total)

    asyncio.run(
        pull(
            location.source,
            location.path,
            hub=_hub(os.environ),
            store=location.store,
            sha256=location.sha256,
            on_progress=show,
        )
    )
    return location.found()


def _locate(model: str, revision: str | None) -> Location:
    """Find the model, and say what a short name was taken for."""
    from octavo_engine.store.local import CATALOGUE, locate
    from octavo_engine.store.source import at_revision

    location = locate(at_revision(model, revision) if revision is not None else model, _store())
    if location.source is not None and model not in CATALOGUE and location.source.text != model:
        print(f"{model}: taken as {location.source.text}", file=sys.stderr)
    return location


def _store() -> Path:
    from octavo_engine.store.local import default_root

    return default_root(os.environ)


def _hub(environment: Mapping[str, str]) -> Hub:
    """The hub, with the token of the environment or of `hf auth login` (huggingface_hub's names and places)."""
    from octavo_engine.store.remote import Hub
    from octavo_engine.store.source import HUB

    token = environment.get("HF_TOKEN", "")
    if not token:
        cache = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache")
        home = Path(environment.get("HF_HOME") or cache / "huggingface")
        with contextlib.suppress(OSError, ValueError):
            token = Path(environment.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8")
    return Hub(endpoint=environment.get("HF_ENDPOINT") or HUB, token=token.strip() or None)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Every option of the engine is a field of its configuration, under the same name."""
    given = {field.name: getattr(options, field.name) for field in fields(EngineConfig) if field.name in options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _engine_config(options: argparse.Namespace, location: Location, names: tuple[str, ...]) -> EngineConfig:
    given = _engine_options(options) | {"model": location.path, "served_model_names": names}
    speculation = given.get("speculative_config")
    if speculation is not None and speculation.model is not None:
        draft = _locate(str(speculation.model), None)
        if draft.is_missing:
            raise ConfigError(f"--speculative-config: 'model': pull it first: octavo pull {speculation.model}")
        given["speculative_config"] = replace(speculation, model=draft.model)
    return location.configure(EngineConfig(**given))


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
    "push": _push,
    "create": _create,
    "show": _show,
    "list": _list,
    "cp": _cp,
    "rm": _rm,
    "ps": _ps,
    "completion": _completion,
}
