"""OpenAI's error envelope, in which every failure of the server is told: {"error": {message, type, param, code}}.

Under /api, where Ollama's clients are, it is {"error": message}.

What is echoed of a request is bounded, so that a small body never makes a large reply.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from octavo_engine.errors import EngineDead, GenerationFailed, NotServing, RequestInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

_MAX_ECHO: Final = 200  # characters of what a user sent

_log = logging.getLogger(__name__)


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    message, param = _printable(message), _printable(param) if param is not None else None
    kinds = {500: "server_error", 503: "service_unavailable_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error of this package."""
    match error:
        case RequestInvalid():
            return error.status, envelope(error.status, str(error), param=error.param, code=error.code)
        case NotServing():
            return 503, envelope(503, str(error), code=error.reason)
        case EngineDead():
            return 503, envelope(503, str(error), code="engine_dead")
        case GenerationFailed():
            return 500, envelope(500, str(error), code="generation_failed")
        case _:
            return 500, envelope(500, "the server failed to answer; its log has the cause")


def respond(error: Exception, path: str) -> JSONResponse:
    """Return the response for an error of this package, to a request for `path`."""
    status, body = describe(error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, NotServing) else None
    return JSONResponse(shaped(body, path), status, headers)


def shaped(body: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the body of an error as the clients of `path` know it."""
    return {"error": body["error"]["message"]} if path.startswith("/api/") else body


def install(app: FastAPI) -> None:
    """Make every error of the application an envelope."""
    for kind in (RequestInvalid, NotServing, EngineDead, GenerationFailed, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return respond(error, request.url.path)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    errors: Sequence[Mapping[str, Any]] = error.errors() if isinstance(error, RequestValidationError) else ()
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    path = _path(first["loc"][1:])  # after "body"
    if isinstance(cause, RequestInvalid):
        param: str | None = _join(path, cause.param or "")
        message = f"{param}: {cause}"
    elif first["type"] == "json_invalid":
        param, message = None, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    elif first["type"] == "missing":
        param, message = path or None, f"{path or 'a JSON body'} is required"
    elif first["type"] == "extra_forbidden":
        param, message = path, f"{path} is not a field that this server knows"
    else:
        param, message = path or None, f"{path or 'body'}: {first['msg'][:_MAX_ECHO]}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more errors)"
    return JSONResponse(shaped(envelope(400, message, param=param), request.url.path), 400)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    status, detail, headers = 500, "", None
    if isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, error.headers
    place = f"{request.method} {request.url.path}"[:_MAX_ECHO]
    body = envelope(status, f"{detail[:_MAX_ECHO]}: {place}")
    return JSONResponse(shaped(body, request.url.path), status, headers)


def _printable(text: str) -> str:
    """Return the text without the halves of characters that JSON can spell and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def _join(path: str, rest: str) -> str:
    return f"{path}{rest}" if rest.startswith("[") else ".".join(filter(None, (path, rest)))


def _path(location: Sequence[str | int]) -> str:
    """Return a place in a body as OpenAI writes it: messages[0].content."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    return path if len(path) <= _MAX_ECHO else path[:_MAX_ECHO] + "..."
