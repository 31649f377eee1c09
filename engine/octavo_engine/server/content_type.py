"""What all routes with bodies have in common: these are JSON, whatever they are called.

curl calls them a form unless told otherwise, and Ollama takes them so. A browser is another matter: what a page sends
under such a name to another origin is sent without asking this server first (the Fetch standard's "CORS-safelisted
request-header"), so any page could use a server that listens on its reader's machine.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.requests import Request

from octavo_engine.errors import RequestInvalid

_SENT_UNASKED: Final = frozenset({"", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})


class AnyContentType(APIRoute):
    """A route that takes bodies as JSON whatever they are called, but from browsers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request (fastapi's "Custom Request and APIRoute class")."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            headers = MutableHeaders(scope=request.scope)
            called = headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and "Origin" in headers and called in _SENT_UNASKED:
                raise RequestInvalid("web pages must send the header Content-Type: application/json", status=415)
            headers["Content-Type"] = "application/json"
            return await handle(Request(request.scope, request.receive))

        return handle_json
