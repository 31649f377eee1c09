"""An API server with faults: a proxy in front of a real one that does to requests what a test asks for.

It speaks HTTP on loopback and passes on what it gets in the name of one user. It runs in a thread of its own, so a test
may wait for its operator meanwhile. What a fault does is a function of the request and of the way to pass it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import aiohttp
from aiohttp import web

from octavo_cluster.playground import tls

if TYPE_CHECKING:
    from pathlib import Path

Forward = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Forward], Awaitable[web.StreamResponse]]

PASSED_ON = ("Accept", "Content-Type", "User-Agent")  # of a request
PASSED_BACK = ("Content-Type", "Retry-After", "Date")  # of an answer
READ_ONLY = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    at: float  # time.monotonic()
    method: str
    path: str

    @property
    def writes(self) -> bool:
        """Whether it asks for a change."""
        return self.method not in READ_ONLY


class FaultProxy:
    """The proxy, in a `with` block.

    Attributes:
        kubeconfig: that of a client which takes the proxy for the API server.
        asked: every request so far.
        fault: what becomes of requests; by default they are passed on.
        watch_seconds: for how long a watch lives; None: as long as the API server lets it.
    """

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.asked: list[Asked] = []
        self.fault: Fault = passed_on
        self.watch_seconds: float | None = None
        self.kubeconfig = folder / "faulty.kubeconfig"
        self._server, self._context = tls(kubeconfig, folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        cluster = {"name": "faulty", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "faulty", "context": {"cluster": "faulty", "user": "faulty"}}
        document = {"apiVersion": "v1", "kind": "Config", "current-context": "faulty", "clusters": [cluster]}
        document |= {"contexts": [context], "users": [{"name": "faulty", "user": {}}]}
        self.kubeconfig.write_text(json.dumps(document))
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def asked_since(self, moment: float) -> list[Asked]:
        """The requests since a moment of time.monotonic()."""
        return [each for each in self.asked if each.at >= moment]

    async def _start(self) -> int:
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(Asked(time.monotonic(), request.method, request.path))
        return await self.fault(request, self._forward)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        url = f"{self._server}{request.raw_path}"
        data = await request.read() or None
        async with self._session.request(request.method, url, data=data, headers=headers) as answer:
            back = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
            response = web.StreamResponse(status=answer.status, headers=back)
            # The client may be gone, and a watch may be over.
            with contextlib.suppress(ConnectionResetError, TimeoutError):
                async with asyncio.timeout(self.watch_seconds if "watch" in request.query else None):
                    await response.prepare(request)
                    async for chunk in answer.content.iter_any():
                        await response.write(chunk)
                await response.write_eof()
        return response


async def passed_on(request: web.Request, forward: Forward) -> web.StreamResponse:
    """No fault."""
    return await forward(request)


def answering(status: int, retry_after: int | None = None) -> Fault:
    """The API server answers every request with an error."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = {"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": status, "message": f"fault {status}"}

    async def fault(request: web.Request, forward: Forward) -> web.StreamResponse:
        del request, forward
        return web.json_response(body, status=status, headers=headers)

    return fault


def slow(seconds: float) -> Fault:
    """The API server takes its time for every request."""

    async def fault(request: web.Request, forward: Forward) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await forward(request)

    return fault


def at_write(number: int, act: Callable[[], None], *, arrives: bool) -> Fault:
    """At the write of that number (from 1) do something; the write itself arrives all the same, or does not."""
    writes = 0

    async def fault(request: web.Request, forward: Forward) -> web.StreamResponse:
        nonlocal writes
        if request.method not in READ_ONLY:
            writes += 1
            if writes == number:
                await request.read()
                act()
                if not arrives:
                    raise web.HTTPBadGateway
        return await forward(request)

    return fault
