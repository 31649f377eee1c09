"""The FastAPI application over a Service: routes, error envelope, request ids."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders

import octavo_engine
from octavo_engine.errors import NotServing
from octavo_engine.server import envelope, health
from octavo_engine.server.openai import routes
from octavo_engine.server.service import RETRY_SECONDS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from octavo_engine.server.service import Service

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="Octavo", version=octavo_engine.__version__)
    app.state.service = service
    app.include_router(health.router)
    app.include_router(routes.router)
    envelope.install(app)
    app.add_middleware(_EveryRequest, service=service)
    return app


class _EveryRequest:
    """X-Request-Id on every response, the client's where it sent one; what draining means for connections."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("X-Request-Id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if self._service.draining:  # the next request on this connection would be refused
                    headers["Connection"] = "close"
            await send(message)

        if self._service.draining:
            # Requests that began before are let through, whatever they have still to pass. Probes are always answered.
            reason = self._service.readiness.reason
            refusal = envelope.respond(NotServing(reason, retry_after=RETRY_SECONDS))
            app = refusal if scope["method"] == "POST" else self._app
            await app(scope, receive, send_with_headers)
            return
        with self._service.in_flight():
            await self._app(scope, receive, send_with_headers)
