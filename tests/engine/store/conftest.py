"""A web server that does what a test says: cuts, stalls, lies; and pulls from it without waiting between attempts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pytest

from octavo_engine.store.pull import pull
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import parse_source
from octavo_engine.store.transfer import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from octavo_engine.store.source import Source

PATH = "/org/repo/resolve/main/model.gguf"
SOURCE = parse_source("hf://org/repo:model.gguf")


@dataclass
class ModelServer:
    """A web server with one file, which behaves as the test says, and remembers what it was asked.

    Of a range that is answered as such, `break_after` counts the bytes of the range.
    """

    content: bytes
    etag: str | None = '"v1"'
    linked_etag: str | None = None  # the hub's digest, on a redirect as the hub sends it
    break_after: list[int] = field(default_factory=list)  # bytes after which each next answer breaks off
    stall_after: list[int] = field(default_factory=list)  # bytes after which each next answer stalls
    statuses: list[int] = field(default_factory=list)  # what the next answers are, before any 200
    token: str | None = None
    ranges: bool = True
    announce: bool = True  # send Content-Length
    lie: Callable[[int, int, bytes], tuple[int, int, bytes]] | None = None  # of a range: begin, end, what is sent
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)  # stalling ends
    port: int = 0

    def fetched_ranges(self) -> list[str]:
        """The ranges that were asked for, but for the first byte by which a file's length is learnt."""
        asked = [headers.get("Range", "") for _, headers in self.requests]
        return [text.removeprefix("bytes=") for text in asked if text not in {"", "bytes=0-0"}]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET as the server's state says."""

    server: ModelHTTPServer

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer."""
        state = self.server.state
        state.requests.append((self.path, dict(self.headers.items())))
        if state.statuses:
            self.simple(state.statuses.pop(0))
        elif state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
            self.simple(401)
        elif self.path not in {PATH, "/blob"}:
            self.simple(404)
        elif state.linked_etag is not None and self.path == PATH:
            self.simple(302, {"Location": "/blob", "X-Linked-ETag": f'"{state.linked_etag}"'})
        else:
            self.file(state)

    def simple(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer without a body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, state: ModelServer) -> None:
        """Answer with the file, or what of it was asked for."""
        total = len(state.content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if state.ranges else None
        if wanted is not None and self.headers.get("If-Range", state.etag) != state.etag:
            wanted = None
        begin, end = (int(wanted[1]), min(int(wanted[2] or total) + 1, total)) if wanted else (0, total)
        if wanted is not None and begin >= total:
            self.simple(416, {"Content-Range": f"bytes */{total}"})
            return
        content = state.content[begin:end]
        is_question = wanted is not None and end == 1  # how long is the file? It is answered truly
        if wanted is not None and not is_question and state.lie is not None:
            begin, end, content = state.lie(begin, end, content)
        self.send_response(206 if wanted else 200)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        if state.announce:
            self.send_header("Content-Length", str(end - begin))
        if state.etag is not None:
            self.send_header("ETag", state.etag)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client may leave
            if is_question:
                self.wfile.write(content)
            else:
                self.misbehave(state, content)

    def misbehave(self, state: ModelServer, content: bytes) -> None:
        """Send the content, or what the test wants of it."""
        if state.break_after:
            content = content[: state.break_after.pop(0)]
        if state.stall_after:
            self.wfile.write(content[: state.stall_after.pop(0)])
            state.is_over.wait(30)
        else:
            self.wfile.write(content)


class ModelHTTPServer(http.server.ThreadingHTTPServer):
    """Knows how to behave."""

    daemon_threads = True

    def __init__(self, state: ModelServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state


@pytest.fixture
def content() -> bytes:
    """A model of about a megabyte."""
    return b"GGUF" + bytes(range(256)) * 4000


@pytest.fixture
def sha256(content: bytes) -> str:
    """Its digest."""
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(content: bytes) -> Iterator[ModelServer]:
    """A server that has it."""
    state = ModelServer(content)
    with ModelHTTPServer(state) as listening:
        state.port = listening.server_port
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.is_over.set()
        listening.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the model shall go."""
    return tmp_path / "models" / "model.gguf"


def fetch_from(
    server: ModelServer,
    target: Path,
    *,
    source: Source = SOURCE,
    token: str | None = None,
    sha256: str | None = None,
    store: Path | None = None,
    num_retries: int = 3,
    num_pulls: int = 1,
    part_bytes: int = 2**30,
    stall_seconds: float = 30.0,
) -> list[int]:
    """What the fixture gives."""
    told: list[int] = []
    hub = Hub(endpoint=f"http://127.0.0.1:{server.port}", token=token)
    limits = Limits(stall_seconds=stall_seconds, delays=(0.0,) * num_retries, part_bytes=part_bytes)

    async def all_pulls() -> None:
        pulls = (
            pull(
                source,
                target,
                hub=hub,
                store=store,
                sha256=sha256,
                on_progress=lambda done, _total: told.append(done),
                limits=limits,
            )
            for _ in range(num_pulls)
        )
        await asyncio.gather(*pulls)

    asyncio.run(all_pulls())
    return told


@pytest.fixture
def fetch(server: ModelServer) -> Callable[..., list[int]]:
    """Pull from the server; returns the progress told."""
    return partial(fetch_from, server)
