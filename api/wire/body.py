"""A request's body and its content type: reads within limits, and lets the client read the refusal.

Large bodies and answers share the room that there is for them: else a few requests could fill the memory, with bodies
that are announced and do not come, or answers that nobody reads. Does not know: what is in the body.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from api.errors import shorten
from api.wire import safetensors
from api.wire.hot_bodies import Wire
from htm_service.errors import BodyTooLarge, Overloaded, UnsupportedMediaType

THREAD_BYTES = 256 << 10
"""Bodies and answers above this are parsed and built in a thread; below, the hop costs more than it saves:
parsing 256 KiB takes up to 3 ms as JSON and 0.2 ms as safetensors."""

DISCARD_BYTES = 512 << 20
DISCARD_SECONDS = 10.0

_WIRES: dict[str, Wire] = {"application/json": "json", safetensors.MEDIA_TYPE: "safetensors"}


class Room:
    """How many bytes large bodies and answers may take at one time, all together; the first always fits."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    def take(self, scope: Scope, num_bytes: int, *, must: bool) -> None:
        """Let a request hold so many bytes more. Raises Overloaded, unless it must."""
        own = scope.get("htm.held", 0)
        if not must and self._held_bytes > own and self._held_bytes + num_bytes > self._max_bytes:
            raise Overloaded(f"others' large bodies and answers leave no room in {self._max_bytes} (--max-held-bytes)")
        self._held_bytes += num_bytes
        scope["htm.held"] = own + num_bytes

    def leave(self, scope: Scope) -> None:
        """A request is over."""
        self._held_bytes -= scope.pop("htm.held", 0)


def hold(request: Request, num_bytes: int, *, must: bool = False) -> None:
    """Let a request hold so many bytes more until it is over. Raises Overloaded, unless it must."""
    room: Room = request.app.state.room
    room.take(request.scope, num_bytes, must=must)


def wire_of(request: Request) -> Wire:
    """How the body is written. Raises UnsupportedMediaType."""
    header = request.headers.get("content-type", "")
    wire = _WIRES.get(header) or _WIRES.get(header.partition(";")[0].strip().lower())
    if wire is None:
        raise UnsupportedMediaType(
            f"the content type is {shorten(header)}; use application/json or {safetensors.MEDIA_TYPE}"
            if header
            else f"there is no content type; use application/json or {safetensors.MEDIA_TYPE}"
        )
    check_encoding(request)
    return wire


def check_encoding(request: Request) -> None:
    """Raises UnsupportedMediaType for a compressed body."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"the content encoding is {shorten(encoding)}; send the body as it is")


async def stream_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes; what is not taken yet is not read. Raises as `read_body`."""
    await _check_declared(request, limit)
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > limit:
            await _discard(request, num_bytes)
            raise BodyTooLarge(f"the body has more than {limit} bytes, which is the limit")
        yield part


async def read_body(request: Request, limit: int, advice: str = "") -> bytes | bytearray:
    """The whole body. Raises BodyTooLarge beyond `limit` bytes, Overloaded, ClientDisconnect when nobody is there."""
    num_declared = await _check_declared(request, limit, advice)
    num_held = THREAD_BYTES
    if num_declared > num_held:
        hold(request, num_declared)
        num_held = num_declared
    # Joining 40 MB at the end would hold the event loop for 30 ms; copying each part as it comes does not.
    whole = bytearray(num_declared) if num_declared > THREAD_BYTES else bytearray()
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        if not more and num_bytes == 0 and len(part) <= limit:
            return part
        whole[num_bytes : num_bytes + len(part)] = part
        num_bytes += len(part)
        if num_bytes > limit:
            whole.clear()
            if more:
                await _discard(request, num_bytes)
            raise BodyTooLarge(f"the body has more than {limit} bytes, which is the limit{advice}")
        if num_bytes > num_held:
            hold(request, num_bytes - num_held)
            num_held = num_bytes
        if not more:
            del whole[num_bytes:]
            return whole


def declared_bytes(request: Request) -> int | None:
    """How many bytes the body has, if the request says so."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdecimal() else None


async def _check_declared(request: Request, limit: int, advice: str = "") -> int:
    """How many bytes the body says it has, 0 when it does not say. Raises BodyTooLarge."""
    num_declared = declared_bytes(request) or 0
    if num_declared > limit:
        # A client that waits for "100 Continue" has sent nothing yet, and reading would ask it to.
        if "100-continue" not in request.headers.get("expect", "").lower():
            await _discard(request, 0)
        raise BodyTooLarge(f"the body has {num_declared} bytes, the limit is {limit}{advice}")
    return num_declared


async def _discard(request: Request, num_bytes: int) -> None:
    """Read on and drop, within bounds: most clients read no answer before they have sent their body."""
    deadline = time.monotonic() + DISCARD_SECONDS
    while num_bytes < DISCARD_BYTES:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await request.receive()
        except TimeoutError:
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        num_bytes += len(message.get("body", b""))
