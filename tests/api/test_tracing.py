"""Traces: a real collector gets one for each request, with what its time went into. And the log as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import pairwise
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from api.app import create_app
from api.logs import Objects
from api.settings import Settings
from tests.api.conftest import Serve, fill, talk_to
from tests.api.exercised import FailingEngine

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector:
    """An OpenTelemetry collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                got = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for of_resource in got.resource_spans:
                    collector.resources |= {one.key: one.value.string_value for one in of_resource.resource.attributes}
                    for of_scope in of_resource.scope_spans:
                        collector.spans += of_scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


async def test_a_request_is_a_trace_of_what_its_time_went_into(serve: Serve, collector: Collector) -> None:
    async with serve(otlp_endpoint=collector.url) as client:
        await fill(client)
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "find-me"}
        body = {"attend": {"queries": [1, 0, 0]}, "append": {"embeddings": [1, 0, 0], "payloads": [{"text": "secret"}]}}
        assert (await client.post("/v1/sessions/s/step", json=body, headers=headers)).status_code == 200
        assert (await client.get("/v1/sessions/nobody", headers=headers)).status_code == 404
    (step,) = await asyncio.to_thread(collector.of, "step")
    assert step.trace_id.hex() == TRACE and step.parent_span_id.hex() == "b7ad6b7169203331"
    assert step.kind == Span.SPAN_KIND_SERVER
    assert attributes(step) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "htm.request_id": "find-me",
    }
    parts = [span for span in collector.spans if span.parent_span_id == step.span_id]
    assert [span.name for span in parts] == ["parse", "queue", "compute", "store", "encode"]
    for span, following in pairwise(parts):
        assert step.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= following.end_time_unix_nano <= step.end_time_unix_nano
    (missing,) = collector.of("inspect_session")
    assert attributes(missing)["error.type"] == "session_not_found"
    assert missing.status.code == Status.STATUS_CODE_UNSET, "the caller's mistake, not ours"
    assert collector.resources["service.name"] == "htm-service"
    assert all(b"secret" not in span.SerializeToString() for span in collector.spans)


async def test_what_fails_is_an_error(serve: Serve, collector: Collector) -> None:
    engine: Any = FailingEngine(RuntimeError("a secret"))
    app = create_app(Settings(store_url="memory://", otlp_endpoint=collector.url), engine=engine)
    async with app.router.lifespan_context(app), talk_to(app) as client:
        assert (await client.post("/v1/sessions/s/attend", json={"queries": [1]})).status_code == 500
    (attend,) = collector.of("attend")
    assert attend.status.code == Status.STATUS_CODE_ERROR and attend.status.message == "internal_error"
    assert b"secret" not in attend.SerializeToString()


async def test_a_collector_that_is_not_there_keeps_nobody_waiting(serve: Serve) -> None:
    async with serve(otlp_endpoint="http://127.0.0.1:1") as client:
        await fill(client)
        assert (await client.post("/v1/sessions/s/attend", json={"queries": [1, 0, 0]})).status_code == 200


async def test_the_log_as_json_names_the_request(client: httpx.AsyncClient) -> None:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Objects())
    logging.getLogger("api").addHandler(handler)
    try:
        engine: Any = FailingEngine(RuntimeError("lost\nhalf \ud800"))
        async with talk_to(create_app(Settings(store_url="memory://"), engine=engine)) as failing:
            await failing.get("/v1/info", headers={"X-Request-Id": "find-me"})
    finally:
        logging.getLogger("api").removeHandler(handler)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["request_id"] == "find-me" and record["level"] == "error" and record["logger"] == "api.middleware"
    assert "GET /v1/info" in record["message"] and "RuntimeError: lost" in record["exception"]
