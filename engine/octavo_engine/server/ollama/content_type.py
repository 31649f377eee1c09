"""What all routes of Ollama's have in common: bodies are JSON, whatever they are called."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.requests import Request


class AnyContentType(APIRoute):
    """A route that takes bodies as JSON whatever they are called, as Ollama does: curl calls them a form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request (fastapi's "Custom Request and APIRoute class")."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            MutableHeaders(scope=request.scope)["Content-Type"] = "application/json"
            return await handle(Request(request.scope, request.receive))

        return handle_json
