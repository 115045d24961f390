"""What happens to sessions as server-sent events: recalls, appends, changes. Does not know: who reads them, and why.

The text is the HTML standard's (9.2.5): an event's name and one line of JSON, ended by an empty line.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.openapi import problems
from api.routes.context import JsonRoute, caller_of, engine_of
from api.schemas.views import content_of, when
from htm_service import records
from htm_service.sessions.feed import Reader

LOOK_EVERY_S = 1.0
"""How often a stream without events looks whether to end."""
HEARTBEAT_S = 10.0
GATHER_S = 0.25
"""Between two pieces of a stream: what is put into JSON on the event loop is bounded, however much happens."""
STALLED_S = 30.0
"""How long a client may take nothing of its stream."""
_EXAMPLE = (
    'event: append\ndata: {"session":"agent-7","at":"2026-11-27T09:00:00Z","start":40,"length":41,"num_chunks":2}\n\n'
)


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(tags=["inspection"], route_class=JsonRoute)
    told = {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}}
    routes.add_api_route(
        "/v1/events",
        events,
        methods=["GET"],
        operation_id="events",
        response_class=Response,
        responses={
            200: {
                "description": "Events, until the client goes, its key counts no more or the server stops.",
                "content": told,
            },
            **problems(("overloaded", "unhealthy", "draining", "internal_error")),
        },
    )
    return routes


async def events(
    request: Request,
    session: Annotated[str | None, Query(description="Only of this session.")] = None,
    seconds: Annotated[float | None, Query(gt=0, le=86_400, description="End the stream after so long.")] = None,
) -> Response:
    """Tell recalls, appends, truncations and changes of sessions as they happen: server-sent events.

    `recall` has what `/recalls` has of one, `append` and `truncate` what these answer, `session` a `change` (`created`,
    `forked`, `updated`, `deleted`); each with `session` and `at`. A reader that does not keep up loses the oldest, and
    `dropped` says how many.
    """
    engine = engine_of(request)
    caller = caller_of(request)
    reader = engine.listen(caller.space, session)
    ends_at = float("inf") if seconds is None else time.monotonic() + seconds

    def is_over() -> bool:
        return engine.is_draining or time.monotonic() >= ends_at or not caller.still_counts(engine.keys)

    return EventStream(reader, is_over)


class EventStream(StreamingResponse):
    """The events of one reader, until `is_over`. One who takes nothing for long is cut off."""

    media_type = "text/event-stream"

    def __init__(self, reader: Reader, is_over: Callable[[], bool]) -> None:
        super().__init__(pieces(reader, is_over), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The stream; the reader is closed with it."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError):  # the server closes what is not a whole answer
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._reader.close()


async def pieces(reader: Reader, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The text of a stream: at once a comment, so that the client knows that it reads; then events as they come."""
    yield b": htm-service\n\n"
    told_at = time.monotonic()
    while True:
        happened, num_dropped = await reader.take(LOOK_EVERY_S)
        if is_over():  # asked last, so that nobody is told what came after the end
            return
        if happened:
            told = [_text("dropped", {"num_dropped": num_dropped})] if num_dropped else []
            yield b"".join([*told, *map(text_of, happened)])
        elif time.monotonic() - told_at >= HEARTBEAT_S:
            yield b": still here\n\n"
        else:
            continue
        told_at = time.monotonic()
        await asyncio.sleep(GATHER_S)


def text_of(event: records.Event) -> bytes:
    """One event."""
    what = event.what
    if isinstance(what, records.Recall):
        content = content_of(what)
    elif isinstance(what, records.TruncateResult):
        content = {"length": what.length, "num_chunks": what.num_chunks}
    elif isinstance(what, records.AppendResult):
        content = {"start": what.start, "length": what.length, "num_chunks": what.num_chunks}
    else:
        content = {"change": what}
    return _text(event.kind, {"session": event.key.id, **content, "at": when(event.at)})


def _text(name: str, content: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(content, option=orjson.OPT_UTC_Z))
