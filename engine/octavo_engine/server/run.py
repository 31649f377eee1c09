"""The API process from its start to its end: uvicorn, signals, draining. Called by the command line.

The socket listens before anything is loaded, so that /ready can tell what is awaited, and until the last running
request has ended, so that clients get a 503 with Retry-After and no refused connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from typing import TYPE_CHECKING, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo_engine import transport
from octavo_engine.errors import ConfigError, EngineDead
from octavo_engine.server.app import CONNECTED_AT, create_app
from octavo_engine.server.service import Service
from octavo_engine.server.shelf import Shelf

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from octavo_engine.client import Started
    from octavo_engine.config import ServerConfig
    from octavo_engine.server.front import Front
    from octavo_engine.store.local import Location
    from octavo_engine.store.remote import Hub

_BACKLOG: Final = 2048
_KEEP_ALIVE_SECONDS: Final = 75  # longer than proxies and clients keep idle connections: they close them, not we
_TELL_SECONDS: Final = 3.0  # how long /health tells of a dead engine before this process ends too

_log = logging.getLogger(__name__)


def serve(config: ServerConfig, location: Location, hub: Hub, started: Started | None) -> None:
    """Serve until a signal comes, then drain. The engine is `started`, or will be when the model is there.

    Raises:
        UserError: the model cannot be served, the address cannot be listened on, or a file with keys or certificates
            cannot be used.
        EngineDead: the engine process ended by itself.
    """
    with listen(config.host, config.port) as sock:
        asyncio.run(_serve(config, location, hub, started, sock))


def serve_many(config: ServerConfig, store: Path, hub: Hub) -> None:
    """Serve the models of a store until a signal comes, then drain. Raises as `serve` does."""

    async def serve_shelf() -> None:
        await run_service(Shelf(config, store, hub), sock)

    with listen(config.host, config.port) as sock:
        asyncio.run(serve_shelf())


async def _serve(
    config: ServerConfig, location: Location, hub: Hub, started: Started | None, sock: socket.socket
) -> None:
    spawn = transport.spawn if started is None else lambda _config: started
    await run_service(Service(config, location, hub, spawn), sock)


async def run_service(front: Front, sock: socket.socket) -> None:
    """Serve on a listening socket until a signal comes, then drain. Raises as `serve` does, ConfigError included."""
    server = _Server(front)
    _log.info("listening on %s://%s:%d", "https" if server.config.is_ssl else "http", *sock.getsockname()[:2])
    listening = asyncio.create_task(server.serve(sockets=[sock]))
    working = asyncio.create_task(front.run())
    try:
        await asyncio.wait((listening, working), return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not front.draining:
            if isinstance(working.exception(), EngineDead):
                await asyncio.sleep(_TELL_SECONDS)
            working.result()
        await listening
    finally:
        server.should_exit = True
        working.cancel()
        await front.close()
        await asyncio.gather(listening, working, return_exceptions=True)


class Connection(H11Protocol):
    """uvicorn's, which tells the application how old it is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Note when (asyncio.Protocol)."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, CONNECTED_AT: time.monotonic()}


class _Server(uvicorn.Server):
    """uvicorn, which on its own would close the socket at the first signal."""

    def __init__(self, front: Front) -> None:
        options = front.config
        config = uvicorn.Config(
            create_app(front),
            http=Connection,
            log_config=None,
            access_log=False,  # service.py logs each generation; probes are not worth a line
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_ca_certs=None if options.ssl_ca_certs is None else str(options.ssl_ca_certs),
            ssl_cert_reqs=ssl.CERT_NONE if options.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"--ssl-certfile, --ssl-keyfile and --ssl-ca-certs do not work: {error}") from error
        super().__init__(config)
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second. Runs as a signal handler in the main thread."""
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        _log.info("got %s", signal.Signals(sig).name)
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            os._exit(128 + sig)

    async def _drain(self) -> None:
        # Clients make new connections, which find another replica: idle ones end now, the others after their answer,
        # whose head may have left before it could say so.
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._front.drain()
        self.should_exit = True
        await self._front.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from error
