"""The async client's own connections: asyncio's, in each process and event loop its own.

Does not know HTTP's messages (`message.py`), nor what is sent again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Sequence

from htm_client.calls import Call, Source
from htm_client.errors import FileFailed
from htm_client.transport.base import NoResponse, Response
from htm_client.transport.connections import IdleConnections, is_readable
from htm_client.transport.message import Address, AnswerParser
from htm_client.transport.security import client_context, is_refused_certificate


class AsyncConnection(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = AnswerParser()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._progress_at = 0.0
        self._num_unsent = 0
        self._writable = asyncio.Event()
        """Whether more may be written; or nothing need be, because the answer is there, or the end."""

    @property
    def can_go_on(self) -> bool:
        """Whether it may carry another request after an answer."""
        return self._parser.can_go_on

    async def ask(self, request: Sequence[bytes], call: Call, max_silence_s: float | None) -> Response:
        """Send a request and wait for its answer. Raises NoResponse, also after so many seconds without progress; and
        FileFailed.
        """
        if self._transport is None:
            raise NoResponse("the connection ended before the request", may_be_done=False)
        self._parser.begin(call.sink)
        self._answer = self._loop.create_future()
        self._writable.set()
        for part in request:
            self._transport.write(part)
        self._progress_at = self._loop.time()
        self._num_unsent = self._transport.get_write_buffer_size()
        if max_silence_s is not None:
            self._timer = self._loop.call_later(max_silence_s, self._watch, max_silence_s)
        try:
            if call.source is not None:
                await self._send(call.source, self._answer)
            return await self._answer
        finally:
            self._answer = None
            if self._timer is not None:
                self._timer.cancel()

    def is_usable(self) -> bool:
        """Whether nothing came over it since the last answer, not even its end that the loop has not seen yet."""
        if self._transport is None or self._transport.is_closing():
            return False
        connected: socket.socket = self._transport.get_extra_info("socket")
        return not is_readable(connected)

    def close(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """A part of an answer; what nobody asked for ends the connection."""
        if self._answer is None or self._answer.done() or self._transport is None:
            self.close()
            return
        self._progress_at = self._loop.time()
        try:
            response = self._parser.feed(data)
        except (NoResponse, FileFailed) as error:
            self._answer.set_exception(error)
            self._writable.set()
            return
        if response is not None:
            self._parser.can_go_on &= self._transport.get_write_buffer_size() == 0
            self._answer.set_result(response)
            self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, and with it perhaps the answer."""
        self._transport = None
        self._writable.set()
        if self._answer is None or self._answer.done():
            return
        self._parser.can_go_on = False
        try:
            if error is not None:
                raise NoResponse(f"the connection is lost: {error!r}", may_be_done=True)
            self._answer.set_result(self._parser.end())
        except NoResponse as lost:
            self._answer.set_exception(lost)

    def pause_writing(self) -> None:
        """Enough is on its way."""
        if self._answer is not None and not self._answer.done():
            self._writable.clear()

    def resume_writing(self) -> None:
        """More may be written."""
        self._progress_at = self._loop.time()
        self._writable.set()

    async def _send(self, source: Source, answer: asyncio.Future[Response]) -> None:
        """Send what comes in pieces, unless the answer is there before. Raises FileFailed."""
        pieces = source.pieces()
        try:
            while not answer.done() and self._transport is not None:
                piece = await asyncio.to_thread(next, pieces, None)
                if piece is None:
                    return
                if self._transport is not None:
                    self._transport.write(piece)
                await self._writable.wait()
            self._parser.can_go_on = False
        finally:
            pieces.close()

    def _watch(self, max_silence_s: float) -> None:
        """End the wait when nothing came or went for so many seconds; otherwise look again then."""
        if self._answer is None or self._answer.done() or self._transport is None:
            return
        now, num_unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if num_unsent < self._num_unsent:
            self._progress_at, self._num_unsent = now, num_unsent
        left = self._progress_at + max_silence_s - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._watch, max_silence_s)
        else:
            self._answer.set_exception(NoResponse(f"no answer within {max_silence_s:g} s", may_be_done=True))
            self._writable.set()


class AsyncTransport:
    """Sends calls to one server; each event loop that uses it has connections of its own, which end with it."""

    def __init__(self, address: Address, timeout: float | None) -> None:
        self._address = address
        self._timeout = timeout
        self._context: ssl.SSLContext | None = None
        self._is_closed = False
        self._kept: dict[tuple[int, asyncio.AbstractEventLoop], _OfLoop] = {}

    async def send(self, call: Call) -> Response:
        """The answer. Raises NoResponse, and RuntimeError after `close`."""
        here = self._kept.get((os.getpid(), asyncio.get_running_loop())) or await self._begin()
        connection = here.idle.take() or await self._connect()
        try:
            response = await connection.ask(self._address.request(call), call, _patience(self._timeout, call))
        except BaseException:  # cancelled, too: what is left of the answer must not become the next one's
            connection.close()
            raise
        if connection.can_go_on:
            here.idle.put(connection)
        else:
            connection.close()
        return response

    async def close(self) -> None:
        """Close all connections, also those of other loops of this process. Safe to call twice."""
        self._is_closed = True
        for (process, loop), kept in list(self._kept.items()):
            if process != os.getpid() or loop.is_closed():
                continue
            if loop is asyncio.get_running_loop():
                kept.idle.close()
                await asyncio.sleep(0)  # the loop closes their sockets
            else:
                loop.call_soon_threadsafe(kept.idle.close)

    async def _begin(self) -> _OfLoop:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        process, loop = os.getpid(), asyncio.get_running_loop()
        for key in list(self._kept):
            if key[0] == process and key[1].is_closed():
                self._kept.pop(key, None)
        # Those of the process that this one was forked from stay: to close them would reach into its event loop.
        self._kept[process, loop] = kept = _OfLoop()
        await anext(kept.until_end)
        return kept

    async def _connect(self) -> AsyncConnection:
        self._address.check()
        if self._address.is_secure and self._context is None:
            self._context = client_context()
        address, loop = self._address, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(
                    AsyncConnection, address.host, address.port, ssl=self._context
                )
        except OSError as error:  # TimeoutError too
            raise NoResponse(
                f"no connection to {address.url}: {error!r}",
                may_be_done=False,
                is_hopeless=is_refused_certificate(error),
            ) from error
        return connection


class _OfLoop:
    """The connections of one event loop."""

    def __init__(self) -> None:
        self.idle: IdleConnections[AsyncConnection] = IdleConnections()
        self.until_end = _close_at_end(self.idle)


async def _close_at_end(idle: IdleConnections[AsyncConnection]) -> AsyncGenerator[None, None]:
    """Once begun, closes them when the loop ends, which first ends what generators are open (PEP 525)."""
    try:
        yield
    finally:
        idle.close()


def _patience(timeout: float | None, call: Call) -> float | None:
    """How long nothing may come or go."""
    return timeout if timeout is None or call.max_silence_s is None else max(timeout, call.max_silence_s)
