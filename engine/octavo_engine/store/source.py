"""The names of model files outside this machine, and the web addresses they stand for.

    hf://ORG/REPO[@REVISION]:FILE.gguf      a file on the Hugging Face hub; the revision is a branch, tag or commit
    https://HOST/PATH/FILE.gguf             a file on a web server; http:// works too

Called by local.py and pull.py. Does no input or output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from octavo_engine.errors import ConfigError, ModelNotFound

HUB: Final = "https://huggingface.co"

_HUB_SOURCE: Final = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?:(?P<file>[^:@?#\s]+\.gguf)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Source:
    """One model file somewhere else."""

    text: str  # as the user wrote it
    path: PurePosixPath  # where it lies in the local store; different sources never share a place
    hub_path: str | None  # the path on the hub; None: not on the hub

    def url(self, hub: str) -> str:
        """Return the address to fetch, with `hub` as the hub's own address (a mirror has another)."""
        return self.text if self.hub_path is None else f"{hub.rstrip('/')}/{self.hub_path}"


def is_source(model: str) -> bool:
    """Tell whether `model` is written as a source and not as a path or a name."""
    return "://" in model


def at_revision(text: str, revision: str) -> str:
    """Return the hub source `text` with a revision, which it must not name itself.

    Raises:
        ConfigError: it is no hub source, or names another revision.
    """
    repository, colon, file = text.removeprefix("hf://").partition(":")
    if not text.startswith("hf://"):
        raise ConfigError(f"--revision {revision}: only hf:// models have revisions, and {text} is none: leave it out")
    name, _, named = repository.partition("@")
    if named and named != revision:
        raise ConfigError(f"--revision {revision}: {text} names the revision {named} itself: leave one of them out")
    return f"hf://{name}@{revision}{colon}{file}"


def parse_source(text: str) -> Source:
    """Read a source.

    Raises:
        ModelNotFound: it is none of the kinds above.
    """
    scheme = text.partition("://")[0]
    if scheme == "hf":
        return _parse_hub(text)
    if scheme in {"http", "https"}:
        return _parse_web(text)
    raise ModelNotFound(f"{text}: {scheme}:// is not a known kind of source; known: hf://, https://, http://")


def _parse_hub(text: str) -> Source:
    match = _HUB_SOURCE.fullmatch(text)
    if match is None or ".." in text:
        raise ModelNotFound(f"{text} is not of the form hf://ORG/REPO[@REVISION]:FILE.gguf")
    repository, revision, file = match["repository"], match["revision"] or "main", match["file"]
    return Source(
        text=text,
        path=PurePosixPath("hf", repository, revision.replace("/", "--"), file),
        hub_path=f"{repository}/resolve/{quote(revision, safe='')}/{quote(file)}",
    )


def _parse_web(text: str) -> Source:
    parts = urlsplit(text)
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    if not parts.hostname or not segments or not segments[-1].endswith(".gguf"):
        raise ModelNotFound(f"{text} does not name a file that ends in .gguf")
    if any(segment in {".", ".."} or "/" in segment for segment in segments):
        raise ModelNotFound(f"{text}: the path may not contain . or ..")
    host = parts.netloc.rpartition("@")[2].replace(":", "_")
    return Source(text=text, path=PurePosixPath(parts.scheme, host, *segments), hub_path=None)
