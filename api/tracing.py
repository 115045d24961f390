"""Traces for OpenTelemetry: one for each request, with what its time went into, sent to a collector beside the work.

Spans are made when the answer is sent, from times that were noted on the way, so a request waits for none of it.
Does not know: what a call does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from starlette.types import Scope

from api.metrics import Measured
from htm_service.errors import InvalidArgument
from htm_service.version import __version__

SEND_SECONDS = 2.0
"""How long it is tried to send some traces, at a stop too; then they are lost."""

Phase = tuple[str, float, float]
"""What was done, from when to when, in seconds before the end."""


class Traces:
    """Sends traces to `endpoint`, the address of a collector that takes OTLP over HTTP."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidArgument(f"traces need OpenTelemetry ({error}): pip install '.[otel]'") from error
        resource = Resource.create({"service.name": "htm-service", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("htm_service")

    def add(self, scope: Scope, measured: Measured, status: int) -> None:
        """The trace of a request that was answered just now; part of the caller's, if `traceparent` names one."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        now, end = time.time_ns(), time.perf_counter()
        span = self._tracer.start_span(
            measured.call,
            TraceContextTextMapPropagator().extract(headers),
            trace.SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.response.status_code": status,
                "htm.request_id": scope["htm.request_id"],
                **({"error.type": measured.code} if measured.code else {}),
            },
            start_time=now - _nanoseconds(end - measured.began),
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR, measured.code)
        inner = trace.set_span_in_context(span)
        for name, start_s, stop_s in phases(measured, end):
            part = self._tracer.start_span(name, inner, start_time=now - _nanoseconds(end - start_s))
            part.end(now - _nanoseconds(end - stop_s))
        span.end(now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def phases(measured: Measured, end: float) -> Iterator[Phase]:
    """What a hot call's time went into, one after the other; nothing of others, and of those that were refused."""
    timing = measured.timing
    if timing is None:
        return
    yield "parse", measured.began, measured.parsed_at
    at = measured.parsed_at
    for name, seconds in (("queue", timing.queue_s), ("compute", timing.compute_s), ("store", timing.store_s)):
        if seconds:
            yield name, at, at + seconds
            at += seconds
    yield "encode", measured.worked_at, end


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
