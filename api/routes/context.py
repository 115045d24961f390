"""What handlers share: the way from a request to the app's parts, and the body of the calls that are not hot.

Does not know: any call in particular.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, get_args, get_origin

import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from api.auth import Caller
from api.disconnect import Watch
from api.errors import shorten
from api.metrics import Measured, Metrics
from api.settings import Settings
from api.wire.body import check_encoding, read_body
from api.wire.query import check_names
from htm_service.errors import MalformedBody, Unauthenticated, UnsupportedMediaType
from htm_service.records import SessionKey

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none
    from htm_service.engine import Engine


SLOW_S = 0.5
"""Whose body takes longer is asked once more who it is: a key may have been taken back meanwhile."""
MAX_BODY_BYTES = 256 << 10
"""Of calls whose bodies hold no tensors: they are parsed and checked on the event loop."""


def engine_of(request: Request) -> Engine:
    """The engine of the app."""
    engine: Engine = request.app.state.engine
    return engine


def begin(request: Request, operation: str) -> None:
    """Note which call a request turned out to be. Raises Forbidden when its caller may not make it."""
    measured_of(request).call = operation
    caller_of(request).check(operation)


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.scope["htm.caller"]
    return caller


def check_still(request: Request) -> None:
    """Raise Unauthenticated where the caller's key was taken back or expired while its body came."""
    is_slow = time.perf_counter() - measured_of(request).began > SLOW_S
    if is_slow and not caller_of(request).still_counts(engine_of(request).keys):
        raise Unauthenticated("the key was taken back, or has expired, while the body came")


def key_of(request: Request) -> SessionKey:
    """The session that a request names: by its path, in its caller's namespace."""
    return SessionKey(caller_of(request).space, request.path_params["session_id"])


def settings_of(request: Request) -> Settings:
    """The settings of the app."""
    settings: Settings = request.app.state.settings
    return settings


def watch_of(request: Request) -> Watch:
    """The watch over the app's clients."""
    watch: Watch = request.app.state.watch
    return watch


def metrics_of(request: Request) -> Metrics:
    """What the app measures of requests."""
    metrics: Metrics = request.app.state.metrics
    return metrics


def measured_of(request: Request) -> Measured:
    """What is measured of a request."""
    measured: Measured = request.scope["htm.measured"]
    return measured


class JsonRoute(APIRoute):
    """A FastAPI route that refuses what it does not know as every other call does, and reads its body within limits."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler behind our reading of the body and of the query's names."""
        handler = super().get_route_handler()
        parameters = self.dependant.query_params
        known = {field.alias for field in parameters}
        repeatable = {field.alias for field in parameters if _is_list(field.field_info.annotation)}

        async def check_then_handle(request: Request) -> Response:
            begin(request, self.operation_id or "other")
            check_names(request, known, repeatable)
            return await handler(request)

        if self.body_field is None:
            return check_then_handle

        async def read_then_handle(request: Request) -> Response:
            begin(request, self.operation_id or "other")
            header = request.headers.get("content-type", "")
            if header.partition(";")[0].strip().lower() != "application/json":
                found = f"the content type is {shorten(header)}" if header else "there is no content type"
                raise UnsupportedMediaType(f"{found}; use application/json")
            check_encoding(request)
            body = await read_body(request, min(MAX_BODY_BYTES, settings_of(request).max_json_body_bytes))
            check_still(request)
            try:  # FastAPI would answer 422, and take NaN, which is not JSON
                orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise MalformedBody(f"the body is not JSON: {error}") from error
            return await check_then_handle(Request(request.scope, _replay(body)))

        return read_then_handle


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


def _replay(body: bytes | bytearray) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return receive
