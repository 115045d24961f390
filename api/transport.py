"""Connections whose writes of one turn of the loop go out together.

uvicorn writes head and body of an answer apart: two system calls, two packets, and a client that is woken twice.
Does not know: HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_GATHERED_BYTES = 64 << 10
"""More is written at once, so that the transport's own limit still holds a fast sender back."""


class GatheringTransport:
    """Keeps what is written until the loop's next turn; in all else it is `transport`."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes) -> None:
        """Write with what else is written in this turn."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._num_bytes += len(data)
        if self._num_bytes > MAX_GATHERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Close when everything is written."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts, self._num_bytes = self._parts, [], 0
            self._transport.writelines(parts)


class GatheringProtocol(HttpToolsProtocol):
    """uvicorn's protocol on such a transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, GatheringTransport(transport, self.loop)))
