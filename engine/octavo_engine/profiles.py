"""Profiles: further names of a served model, each with a system message, parameters and so on of its own.

A Modelfile as data, so that one engine serves them all. The file is a JSON or YAML list of objects

    {name: support, system: "...", template: "...", parameters: {temperature: 0.2, stop: ["###"]},
     messages: [{role: user, content: "..."}]}

of which only `name` must be there; it is what spec.profiles of an InferenceService says. Called by server/service.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import yaml

from octavo_engine.errors import ConfigError, ModelfileInvalid, RequestInvalid
from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.parameters import check_all, from_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

_FIELDS: Final = frozenset({"name", "system", "template", "parameters", "messages"})
_MAX_BYTES: Final = 2**20  # what a ConfigMap can hold

_log = logging.getLogger(__name__)


class Profiles:
    """The profiles in a file, read again when it changes.

    Args:
        path: the file.
        taken: names that no profile may have.

    Raises:
        ConfigError: the file cannot be read, or is not what it should be.
    """

    def __init__(self, path: Path, taken: Collection[str]) -> None:
        self._path = path
        self._taken = frozenset(taken)
        self._seen: tuple[int, int, int] | None = None  # what the file's metadata was when it was read
        self._profiles: Mapping[str, Modelfile] = {}
        self._read()
        self._reading = asyncio.Lock()

    def current(self) -> Mapping[str, Modelfile]:
        """Return the profiles by name, as they were when they were last looked at."""
        return self._profiles

    async def look_again(self) -> None:
        """Read the file if it has changed. While what is there is wrong, the last profiles count.

        In a thread: YAML of the largest file takes seconds, in which others want their next token. Who asks meanwhile
        waits, as what was written before a request counts for it.
        """
        async with self._reading:
            try:
                if _metadata(self._path) != self._seen:
                    await asyncio.to_thread(self._read)
                    _log.info("%s has changed: it holds %d profiles", self._path, len(self._profiles))
            except ConfigError as error:
                _log.warning("%s; the profiles that it held are served", error)

    def _read(self) -> None:
        self._seen = _metadata(self._path)  # before the content: a change in between is seen the next time
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
            listed = yaml.safe_load(text) if len(text) <= _MAX_BYTES else f"more than {_MAX_BYTES} bytes"
            self._profiles = read_profiles(listed, self._taken)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"--profiles {self._path}: {error}") from error


def read_profiles(listed: object, taken: Collection[str] = ()) -> dict[str, Modelfile]:
    """Return the Modelfiles by name, FROM the model that is served.

    Raises:
        ConfigError: a profile is wrong; the message names it and the field.
    """
    if not isinstance(listed, list):
        raise ConfigError("it is not a list of profiles")
    profiles: dict[str, Modelfile] = {}
    for place, one in enumerate(listed):
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not name:
            raise ConfigError(f"profile {place} has no name")
        if name in taken or name in profiles:
            raise ConfigError(f"profile {name}: the model, or another profile, has this name already")
        try:
            profiles[name] = _profile(one)
        except (ConfigError, ModelfileInvalid, RequestInvalid) as error:
            raise ConfigError(f"profile {name}: {error}") from error
    return profiles


def _profile(one: Mapping[str, Any]) -> Modelfile:
    if unknown := one.keys() - _FIELDS:
        raise ConfigError(f"there is no field {min(map(str, unknown))[:50]!r}; there are {', '.join(sorted(_FIELDS))}")
    system, template, parameters = one.get("system"), one.get("template"), one.get("parameters")
    if not all(isinstance(text, str | None) for text in (system, template)):
        raise ConfigError("system and template are texts")
    if not isinstance(parameters, dict | None):
        raise ConfigError("parameters is an object")
    # Kubernetes has no floating-point numbers in specs: it has them as texts.
    read = {
        name: from_text(name, value) if isinstance(value, str) else value for name, value in (parameters or {}).items()
    }
    modelfile = Modelfile(
        source="model",
        system=system or "",
        template=template or "",
        parameters=check_all(read),
        messages=tuple(map(_message, one.get("messages") or ())),
    )
    return parse_modelfile(modelfile.render())  # which looks at roles and template


def _message(message: object) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content), **rest} if not rest:
            return role, content
        case _:
            raise ConfigError("messages are objects of a role and a content")


def _metadata(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()  # follows links: a mounted ConfigMap is replaced by moving one
    except OSError as error:
        raise ConfigError(f"--profiles {path}: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size, status.st_ino
