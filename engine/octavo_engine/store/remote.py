"""What a source turns out to be: files on servers, each with its address and what is known of it beforehand.

hub.py, registry.py and bucket.py make listings; transfer.py fetches the files of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from octavo_engine.store.source import HUB

if TYPE_CHECKING:
    from pathlib import PurePosixPath

Progress = Callable[[int, int | None], None]  # is told the bytes so far, and in all where the server tells

MODEL_SUFFIXES: Final = (
    ".gguf",
    ".safetensors",
    ".json",
    ".jinja",
    ".txt",
    ".model",
)  # of files that models consist of


@dataclass(frozen=True, slots=True)
class Hub:
    """How to reach the Hugging Face hub."""

    endpoint: str = HUB
    token: str | None = field(default=None, repr=False)  # for gated and private repositories; sent to the hub only


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file on a server."""

    name: PurePosixPath  # relative, in the folder of the model
    url: str
    what: str  # the source that it is of, for messages
    headers: Mapping[str, str] = field(default_factory=dict)  # to send along; a secret may be among them
    num_bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of a file that git keeps itself: of b"blob LENGTH\0" and its bytes
    is_archive: bool = False  # a tar with model files in it, gzipped or not


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All files of a model."""

    files: tuple[RemoteFile, ...]
    modelfile: str = ""  # what the registry says of template, parameters and so on, as a Modelfile of model.gguf
