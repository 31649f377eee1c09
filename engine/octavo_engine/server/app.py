"""The FastAPI application over a Front: routes, error envelope, request ids, bounds of bodies and connections."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import octavo_engine
from octavo_engine.logs import HTTP_REQUEST_ID
from octavo_engine.server import envelope, health, openapi
from octavo_engine.server.auth import OPEN_PATHS, ApiKeys, RequireApiKey
from octavo_engine.server.ollama import embed, manage
from octavo_engine.server.ollama import routes as ollama
from octavo_engine.server.openai import adapters, embeddings, responses, routes, tokens
from octavo_engine.server.tracing import Tracing, tell

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from octavo_engine.server.front import Front

MAX_BODY_BYTES: Final = 8 * 2**20  # a prompt of over a million tokens, as text or as ids
_MAX_DISCARDED_BYTES: Final = 8 * MAX_BODY_BYTES
MAX_CONNECTION_SECONDS: Final = 60.0  # then its client connects anew, and may find a replica that has come since
CONNECTED_AT: Final = "connected_at"  # in the scope's state: when the connection was made, monotonic seconds

_UNCOUNTED: Final = OPEN_PATHS | {"/load"}  # what is asked every few seconds would bury the rest
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(front: Front) -> FastAPI:
    """Return the application.

    Raises:
        ConfigError: the file of API keys cannot be read.
    """
    app = FastAPI(title="Octavo", version=octavo_engine.__version__)
    app.state.front = front
    app.include_router(health.router)
    app.include_router(routes.router)
    app.include_router(embeddings.router)
    app.include_router(responses.router)
    app.include_router(tokens.router)
    app.include_router(adapters.router)
    app.include_router(ollama.router)
    app.include_router(embed.router)
    app.include_router(manage.router)
    envelope.install(app)
    config = front.config
    keys = ApiKeys(config.api_key, config.api_key_file)
    open_paths = frozenset[str]() if config.api_key_for_all else OPEN_PATHS
    openapi.install(app, has_keys=bool(keys), open_paths=open_paths)
    if keys:
        app.add_middleware(RequireApiKey, keys=keys, open_paths=open_paths)
    if config.allowed_origins:  # around the keys: a browser asks whether it may call before it sends one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    tracing = Tracing.to_collector(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    if tracing is not None:
        front.on_close.append(tracing.close)
    app.add_middleware(_EveryRequest, front=front, tracing=tracing)
    return app


class _EveryRequest:
    """X-Request-Id on every response, the client's where it sent one; an end to large bodies and old connections.

    Counts each response by its route, method and status.
    """

    def __init__(self, app: ASGIApp, front: Front, tracing: Tracing | None = None) -> None:
        self._app = app
        self._front = front
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("X-Request-Id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        HTTP_REQUEST_ID.set(request_id)  # for the log, in every task that this one begins
        began = time.monotonic()
        connected_at = scope.get("state", {}).get(CONNECTED_AT, began)
        if not scope["path"].startswith(manage.UPLOADS):
            receive = _bounded(receive)
        status = 500  # of what fails before it answers

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                # The next request would be refused here, or is better made on a new connection.
                if self._front.draining or time.monotonic() - connected_at > MAX_CONNECTION_SECONDS:
                    headers["Connection"] = "close"
            await send(message)

        with contextlib.ExitStack() as stack:
            span = None
            if self._tracing is not None and scope["path"] not in _UNCOUNTED:
                span = stack.enter_context(self._tracing.request(_method(scope), Headers(scope=scope)))
            try:
                await self._answer(scope, receive, send_with_headers)
            finally:
                self._count(scope, status, time.monotonic() - began)
                if span is not None:
                    tell(span, _handler(scope), _method(scope), status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._front.draining:
            # Requests that began before are let through, whatever they have still to pass. Probes are always answered.
            if scope["method"] == "POST":
                refusal = envelope.respond(self._front.refusal_while_draining(), scope["path"])
                await refusal(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        with self._front.in_flight():
            await self._app(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        handler = _handler(scope)
        if handler in _UNCOUNTED:
            return
        self._front.metrics.on_response(handler=handler, method=_method(scope), status=status, seconds=seconds)


def _handler(scope: Scope) -> str:
    """The route's path, with names for its parts."""
    return getattr(scope.get("route"), "path", "none")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _bounded(receive: Receive) -> Receive:
    """`receive`, which becomes an answer of 413 where the body is too large. No more of it is kept than is taken."""
    num_bytes = 0

    async def receive_bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes <= MAX_BODY_BYTES:
            return message
        # A client that still sends when the connection is closed may never see the answer.
        while message.get("more_body", False) and num_bytes <= _MAX_DISCARDED_BYTES:
            message = await receive()
            num_bytes += len(message.get("body", b""))
        raise HTTPException(
            413, f"the body exceeds {MAX_BODY_BYTES // 2**20} MiB, the most that is taken", {"Connection": "close"}
        )

    return receive_bounded
