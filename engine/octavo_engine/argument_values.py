"""How the values of the command line's options are read, and those that they have if they are not given.

argparse puts the option's name before what is said of a value.

Used by arguments.py and server_arguments.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_engine.config import EngineConfig, LoraModule, ServerConfig, SpeculativeConfig
from octavo_engine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULTS: Final = {field.name: field.default for config in (ServerConfig, EngineConfig) for field in fields(config)}

API_KEY_VARIABLE: Final = "OCTAVO_API_KEY"  # of the environment, which cli.py alone reads

_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
    **{f"{letter}i{b}": 1024**power for power, letter in enumerate("KMGT", start=1) for b in ("", "B")},
}
_SIZE: Final = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]*)", re.ASCII)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers in a range."""

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdecimal() else None
        if number is None or number < least or (most is not None and number > most):
            bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return number

    return read


def between(least: float, most: float) -> Callable[[str], float]:
    """Return a reader of numbers in a range."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return number

    return read


def size(text: str) -> int:
    """Read an amount of memory in bytes: 4294967296, 4GiB, 4Gi (as Kubernetes writes it) or 4.3GB.

    A bare letter is refused: Kubernetes takes 4G for 4 * 1000**3 and vLLM for 4 * 1024**3.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match["unit"]) if match is not None else None
    if match is None or factor is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory; write it as 4GiB, 512MiB, 4.3GB or in bytes"
        )
    number: str = match["number"]
    num_bytes: int = round(float(number) * factor) if "." in number else int(number) * factor
    if not 1 <= num_bytes < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 byte to 8 EiB")
    return num_bytes


def api_key(text: str) -> str:
    """Read a key."""
    if not text.isascii() or not text.isprintable() or text != text.strip() or not text:
        raise argparse.ArgumentTypeError("a key has printable ASCII characters and no space at its ends")
    return text


def api_keys_of_environment(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that OCTAVO_API_KEY holds, with blanks between them; none where there is no such variable.

    Raises:
        ConfigError: it holds no key: a server that was meant to have one would be open to all.
    """
    value = environment.get(API_KEY_VARIABLE)
    if value is None:
        return ()
    keys = value.split()
    if not keys:
        raise ConfigError(f"{API_KEY_VARIABLE} is in the environment and holds no key: give it one, or unset it")
    try:
        return tuple(map(api_key, keys))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{API_KEY_VARIABLE} in the environment: {error}") from error


def lora_module(text: str) -> LoraModule:
    """Read NAME=PATH, the name of an adapter and where it is."""
    name, separator, path = text.partition("=")
    if not separator or not name or not path or text.startswith("{"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return LoraModule(name, Path(path).absolute())


def origins(text: str) -> tuple[str, ...]:
    """Read a JSON list of origins."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(origin, str) for origin in found):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of origins such as ["https://example.com"]')
    return tuple(found)


def or_auto(read: Callable[[str], int]) -> Callable[[str], int | None]:
    """Return a reader that takes `auto` too, for None."""
    return lambda text: None if text == "auto" else read(text)


def one_stage(text: str) -> int:
    """Read the number of stages of a pipeline, of which there is one."""
    if text != "1":
        raise argparse.ArgumentTypeError(
            f"{text!r}: pipeline parallelism is not supported; use 1, and --tensor-parallel-size for several devices"
        )
    return 1


def speculation(text: str) -> SpeculativeConfig:
    """Read how tokens are guessed ahead."""
    try:
        return SpeculativeConfig.from_json(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
