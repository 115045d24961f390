"""uvicorn's HTTP/1.1 with bounds: the number of connections, the size of a head, how long a client may do nothing.

uvicorn itself waits for ever, for the rest of a head or a body or for a reader, and takes heads of any size. Here
nothing is timed for each request: all connections are looked at together every few seconds (`Server.on_tick`).
Does not know: what is asked and answered.
"""

from __future__ import annotations

import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import answer

MAX_HEAD_BYTES = 64 << 10
"""Of a request line and its headers, or of what is neither head nor body, trailers and the like, besides what came
together with the piece before."""
MAX_HEADERS = 256
"""Of one request: each takes some 200 bytes, however few it has."""
MAX_SILENCE_S = 30.0
"""How long a client may send nothing of what it has begun, or read nothing of its answer."""
MAX_HEAD_S = 30.0
"""How long a head may take in all."""
MAX_PIPELINED = 64
"""Requests of one connection that may wait for those before them."""
FILES_LEFT = 256
"""Of the files that a process may open, those that connections may not have: the store's, models, the log."""


def raise_file_limit() -> int:
    """Let this process open as many files as it may; how many connections that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(1, soft - FILES_LEFT) if soft != resource.RLIM_INFINITY else 1 << 20


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    max_connections = 1 << 20
    """In this process; the server sets it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._num_bytes = 0
        self._head_from = 0
        """`_num_bytes` where the head began that is not whole yet, or where there was a body last."""
        self._head_since: float | None = None
        self._seen = (0, 0)
        """What had come, and what had not gone, when that changed last."""
        self._seen_at = 0.0

    def connection_made(self, transport: Any) -> None:
        """It is there; one too many is told so and closed."""
        super().connection_made(transport)
        self._head_since = self._seen_at = self.loop.time()
        if len(self.connections) > self.max_connections:
            self._refuse("overloaded", f"there are {self.max_connections} connections, which is the limit")

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes - self._head_from > MAX_HEAD_BYTES:
            self._refuse("headers_too_large", f"the request's head has more than {MAX_HEAD_BYTES} bytes")
        elif self.headers is not None and len(self.headers) > MAX_HEADERS:
            self._refuse("headers_too_large", f"the request has more than {MAX_HEADERS} headers")

    def on_message_begin(self) -> None:
        """A head begins; one too many ends the connection, in the middle of what has come."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            raise ConnectionAbortedError(f"{MAX_PIPELINED} requests wait on one connection, which is the limit")
        super().on_message_begin()
        if self._head_since is None:
            self._head_since, self._head_from = self.loop.time(), self._num_bytes

    def on_headers_complete(self) -> None:
        """A head is whole; one of too many headers ends the parsing, and is then refused."""
        if len(self.headers) > MAX_HEADERS:
            raise ValueError
        self._head_since, self._head_from = None, self._num_bytes
        super().on_headers_complete()
        self.headers = []  # trailers come here: they are nobody's headers (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._head_from = self._num_bytes
        super().on_body(body)

    def on_response_complete(self) -> None:
        """An answer is sent; more is read when no request waits any longer."""
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        if self.headers is None or len(self.headers) <= MAX_HEADERS:
            self._refuse("malformed_body", "the request is not HTTP/1.1")

    def end_if_stuck(self) -> None:
        """Close the connection where its client does nothing of what it has begun; asked every few seconds."""
        now, seen = self.loop.time(), (self._num_bytes, self.transport.get_write_buffer_size())
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        is_sending = self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body
        is_sending &= not self.flow.read_paused  # then it is the server that waits, for what it does with the rest
        is_silent = now - self._seen_at > MAX_SILENCE_S and (is_sending or seen[1] > 0)
        if is_silent or (self._head_since is not None and now - self._head_since > MAX_HEAD_S):
            self.transport.abort()

    def _refuse(self, code: str, detail: str) -> None:
        """Answer without the app, and close."""
        if self.transport.is_closing():
            return
        response = answer({}, code, detail, headers={"Connection": "close"})
        head = [b"HTTP/1.1 %d \r\n" % response.status_code]
        head += [b"%b: %b\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
        self.transport.close()
