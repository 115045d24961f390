"""What handlers share: the way from a request to the engine, its end when the client has gone, and the body of the
calls that are not hot.

Does not know: any call in particular.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import orjson
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from api.body import check_encoding, read_body
from api.errors import shorten
from api.settings import Settings
from htm_service.errors import MalformedBody, UnsupportedMediaType

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none
    from htm_service.engine import Engine

T = TypeVar("T")

WATCH_AFTER_S = 0.1
"""A request that takes longer is watched for its client going away; to watch them all would cost more than it saves."""


def engine_of(request: Request) -> Engine:
    """The engine of the app."""
    engine: Engine = request.app.state.engine
    return engine


def settings_of(request: Request) -> Settings:
    """The settings of the app."""
    settings: Settings = request.app.state.settings
    return settings


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result. It is cancelled, which skips what has not begun, once the client has gone: ClientDisconnect.

    To be called when the body has been read.
    """
    caller = asyncio.current_task()
    assert caller is not None
    watcher: asyncio.Task[None] | None = None
    is_gone = False

    async def wait_until_gone() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        caller.cancel()

    def watch() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(wait_until_gone())

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if not is_gone:
            raise
        caller.uncancel()
        raise ClientDisconnect from None
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


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
