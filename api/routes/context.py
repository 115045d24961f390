"""What handlers share: the way from a request to the app's parts, and the body of the calls that are not hot.

Does not know: any call in particular.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from api.disconnect import Watch
from api.errors import shorten
from api.settings import Settings
from api.wire.body import check_encoding, read_body
from htm_service.errors import MalformedBody, UnsupportedMediaType

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none
    from htm_service.engine import Engine


def engine_of(request: Request) -> Engine:
    """The engine of the app."""
    engine: Engine = request.app.state.engine
    return engine


def settings_of(request: Request) -> Settings:
    """The settings of the app."""
    settings: Settings = request.app.state.settings
    return settings


def watch_of(request: Request) -> Watch:
    """The watch over the app's clients."""
    watch: Watch = request.app.state.watch
    return watch


class JsonRoute(APIRoute):
    """A FastAPI route whose body is read within limits, and refused as every other call refuses it."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler behind our reading of the body."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def read_then_handle(request: Request) -> Response:
            header = request.headers.get("content-type", "")
            if header.partition(";")[0].strip().lower() != "application/json":
                found = f"the content type is {shorten(header)}" if header else "there is no content type"
                raise UnsupportedMediaType(f"{found}; use application/json")
            check_encoding(request)
            body = await read_body(request, settings_of(request).max_json_body_bytes)
            try:  # FastAPI would answer 422, and take NaN, which is not JSON
                orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise MalformedBody(f"the body is not JSON: {error}") from error
            return await handler(Request(request.scope, _replay(body)))

        return read_then_handle


def _replay(body: bytes | bytearray) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return receive
