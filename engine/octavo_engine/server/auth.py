"""API keys: who may use the server. The application (app.py) puts this before every route.

What operators and kubelets ask (OPEN_PATHS) stays open unless asked otherwise. A key is compared by its hash, in
constant time and with every key that there is, so that the time of an answer tells nothing. A file of keys is looked at
on every request and read again when it has changed: keys are rotated without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from octavo_engine.errors import ConfigError
from octavo_engine.server.envelope import envelope, shaped

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics", "/version"})

_log = logging.getLogger(__name__)


class ApiKeys:
    """The keys that are accepted.

    Args:
        keys: from the command line.
        path: a file with more of them, one a line; empty lines and those that begin with # are none.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None) -> None:
        self._given = _hashes(keys)
        self._path = path
        self._seen: tuple[int, int, int] | None = None  # what the file's metadata was when it was read
        self._from_file: tuple[bytes, ...] = ()
        if path is not None:
            try:
                self._read(path)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--api-key-file {path}: {error}") from error

    def __bool__(self) -> bool:
        return self._path is not None or bool(self._given)

    def accept(self, key: str) -> bool:
        """Whether this is one of them."""
        if self._path is not None:
            self._look_again(self._path)
        (digest,) = _hashes([key])
        matches = [hmac.compare_digest(digest, known) for known in (*self._given, *self._from_file)]
        return any(matches)

    def _look_again(self, path: Path) -> None:
        """Read the file if it has changed. While it cannot be read or is empty, the last keys count."""
        try:
            if _metadata(path) != self._seen:
                self._read(path)
                _log.info("%s has changed: it holds %d API keys", path, len(self._from_file))
        except (OSError, ValueError) as error:
            _log.warning("--api-key-file %s: %s; the keys that it held are accepted", path, error)

    def _read(self, path: Path) -> None:
        self._seen = _metadata(path)  # before the content: a change in between is seen the next time
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        found = _hashes(line for line in lines if line and not line.startswith("#"))
        if not found:
            raise ValueError("it holds no key")
        self._from_file = found


class RequireApiKey:
    """ASGI middleware that answers 401 to requests without a key.

    Args:
        app: what is behind it.
        keys: those that are accepted.
        open_paths: what needs no key.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here (ASGI)."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            scheme, _, key = Headers(scope=scope).get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.accept(key.strip()):
                what = "the API key is not one of this server's" if key else "an API key is required"
                body = envelope(401, f"{what}; send it as Authorization: Bearer KEY", code="invalid_api_key")
                await JSONResponse(shaped(body, scope["path"]), 401, {"WWW-Authenticate": "Bearer"})(
                    scope, receive, send
                )
                return
        await self._app(scope, receive, send)


def _hashes(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys)


def _metadata(path: Path) -> tuple[int, int, int]:
    status = path.stat()  # follows links: a mounted Secret is replaced by moving one
    return status.st_mtime_ns, status.st_size, status.st_ino
