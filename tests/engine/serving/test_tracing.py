"""Log lines as JSON, and a span for each request in the trace of who sent it."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Final

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from octavo_engine.logs import HTTP_REQUEST_ID, TRACE_ID, JsonFormatter
from octavo_engine.server import app
from octavo_engine.server.tracing import Tracing

if TYPE_CHECKING:
    from octavo_engine.server.service import Service

TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
PARENT: Final = "b7ad6b7169203331"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Where finished spans are found."""
    return InMemorySpanExporter()


@pytest.fixture
async def traced(service: Service, spans: InMemorySpanExporter) -> httpx.AsyncClient:
    """A client of the application alone, in a middleware that traces."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traced = app._EveryRequest(app.create_app(service), service, Tracing(provider))
    transport = httpx.ASGITransport(traced, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://traced")


async def test_a_request_has_a_span_in_the_trace_of_who_sent_it(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    await traced.post("/v1/completions", json={"model": "fake"}, headers=headers)
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.name == "POST /v1/completions"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 400,
        "octavo.request_id": "mine",
    }


async def test_a_request_without_a_trace_begins_one_and_probes_have_none(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/no/such"):
        await traced.get(path, headers={"traceparent": "nonsense"})
    assert [span.name for span in spans.get_finished_spans()] == ["GET /v1/models", "GET none"]
    assert all(span.parent is None for span in spans.get_finished_spans())


def test_a_line_of_json_has_what_there_is() -> None:
    try:
        int("no")
    except ValueError:
        failed = logging.LogRecord("octavo", logging.ERROR, "", 0, "%d \n é", (5,), sys.exc_info())
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("ERROR", "octavo", "5 \n é")
    assert told["time"].endswith("+00:00")
    assert told["exception"].splitlines()[-1].startswith("ValueError")
    assert not {"request_id", "trace_id"} & told.keys()
    tokens = HTTP_REQUEST_ID.set("mine"), TRACE_ID.set(TRACE)
    try:
        told = json.loads(JsonFormatter().format(logging.LogRecord("octavo", logging.INFO, "", 0, "x", None, None)))
    finally:
        HTTP_REQUEST_ID.reset(tokens[0])
        TRACE_ID.reset(tokens[1])
    assert (told["request_id"], told["trace_id"]) == ("mine", TRACE)
