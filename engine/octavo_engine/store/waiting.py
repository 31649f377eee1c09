"""What `octavo pull --port` tells over HTTP while it works: /ready with phase and bytes, as `octavo serve` has it.

Plain sockets of the standard library in a thread: an init container that fetches a file needs no web framework.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from octavo_engine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo_engine.store.remote import Progress


@dataclass(frozen=True, slots=True)
class Told:
    """Whom to tell how far it is."""

    tell: Progress
    url: str = ""  # where that is answered; empty: nobody asks


@contextmanager
def telling(host: str, port: int | None) -> Iterator[Told]:
    """Answer requests until the context is left; without a port, nobody asks.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    told = {"phase": "Starting", "done": 0, "total": 0, "reason": "the model is to be downloaded"}

    def tell(done: int, total: int | None) -> None:
        told.update(phase="Downloading", done=done, total=total or 0, reason="the model is being downloaded")

    if port is None:
        yield Told(tell)
        return

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Log nothing: probes are not worth a line."""

        def do_GET(self) -> None:
            """Answer /ready, and /health: pulling is healthy."""
            status = {"/ready": 503, "/health": 200}.get(self.path, 404)
            body = json.dumps(told if status == 503 else {"status": "ok" if status == 200 else "not found"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield Told(tell, "http://{}:{}".format(*server.server_address[:2]))
        finally:
            server.shutdown()
            thread.join()
