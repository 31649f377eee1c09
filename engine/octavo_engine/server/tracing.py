"""Traces of requests by OpenTelemetry, in the client's own trace where it sent one (W3C trace context).

app.py opens a span for each request. The library is an extra, `otel`, and imported only where traces are asked for.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from octavo_engine.errors import ConfigError
from octavo_engine.logs import HTTP_REQUEST_ID, TRACE_ID

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


class Tracing:
    """Where spans go.

    Args:
        provider: OpenTelemetry's.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("octavo")

    @classmethod
    def to_collector(cls, endpoint: str) -> Tracing:
        """Send them to a collector by OTLP over HTTP.

        Raises:
            ConfigError: the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error}): pip install 'octavo[engine,otel]'"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "octavo"}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    @contextlib.contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Open the span of a request, which may bring `traceparent` and `tracestate` in its headers."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 - an extra

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        attributes: dict[str, Any] = {"http.request.method": method, "octavo.request_id": HTTP_REQUEST_ID.get()}
        with self._tracer.start_as_current_span(
            method, TraceContextTextMapPropagator().extract(carrier), SpanKind.SERVER, attributes
        ) as span:
            TRACE_ID.set(f"{span.get_span_context().trace_id:032x}")
            yield span

    def close(self) -> None:
        """Send what has not been sent; takes as long as the collector, at most its time-out."""
        self._provider.shutdown()


def tell(span: Span, handler: str, method: str, status: int) -> None:
    """Put how a request was answered into its span. `handler` is the route's path."""
    span.update_name(f"{method} {handler}")
    span.set_attribute("http.route", handler)
    span.set_attribute("http.response.status_code", status)
