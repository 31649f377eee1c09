"""GET /openapi.json: what the server takes and gives, made of the models that it validates with.

FastAPI says of errors what it would do by itself; what this server does is said here.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from fastapi.openapi.utils import get_openapi

from octavo_engine.server.auth import OPEN_PATHS

if TYPE_CHECKING:
    from fastapi import FastAPI

_TEXT: Final = {"type": "string"}
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_OPENAI_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _NULLABLE_TEXT, "code": _NULLABLE_TEXT},
        }
    },
}
_OLLAMA_ERROR: Final = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
_STREAMS: Final = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
    "/api/create": "application/x-ndjson",
    "/api/pull": "application/x-ndjson",
    "/api/push": "application/x-ndjson",
}
_PLAIN: Final = {"/": "text/plain", "/metrics": "text/plain"}


def install(app: FastAPI, *, has_keys: bool, open_paths: frozenset[str] = OPEN_PATHS) -> None:
    """Have an application serve its description; `has_keys` if all paths but `open_paths` want an API key."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of GET and HEAD on one route, of which only GET stays
                document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _correct(document, has_keys=has_keys, open_paths=open_paths)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign] # FastAPI's documentation, "Extending OpenAPI"


def _correct(document: dict[str, Any], *, has_keys: bool, open_paths: frozenset[str]) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= {"Error": _OPENAI_ERROR, "OllamaError": _OLLAMA_ERROR}
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        operations.pop("head", None)
        error = "OllamaError" if path.startswith("/api/") else "Error"
        told = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}}
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)
            if method == "post":
                responses["400"] = told | {"description": "The request is wrong; the message names the field."}
                responses["503"] = told | {"description": "Not now; Retry-After says when to try again."}
            if path in _STREAMS:
                responses["200"]["content"][_STREAMS[path]] = {"schema": _TEXT}
            elif path in _PLAIN:
                responses["200"]["content"] = {_PLAIN[path]: {"schema": _TEXT}}
            if has_keys and path not in open_paths:
                operation["security"] = [{"key": []}]
                responses["401"] = told | {"description": "An API key is missing, or is none of this server's."}
