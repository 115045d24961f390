"""The sync client's own connections: plain sockets, in each process its own.

Does not know HTTP's messages (`message.py`), nor what is sent again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator, Sequence

from htm_client.calls import Call, Source
from htm_client.transport.base import NoResponse, Response
from htm_client.transport.connections import IdleConnections, is_readable
from htm_client.transport.message import Address, AnswerParser
from htm_client.transport.security import client_context, is_refused_certificate

READ_BYTES = 256 << 10


class BlockingConnection:
    """One connection. Raises NoResponse when it cannot be made."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, timeout: float | None) -> None:
        self._parser = AnswerParser()
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout)
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if context is not None:
                    self._socket = context.wrap_socket(self._socket, server_hostname=address.host)
            except BaseException:
                self._socket.close()
                raise
        except OSError as error:
            raise NoResponse(
                f"no connection to {address.url}: {error!r}",
                may_be_done=False,
                is_hopeless=is_refused_certificate(error),
            ) from error

    @property
    def can_go_on(self) -> bool:
        """Whether it may carry another request after an answer."""
        return self._parser.can_go_on

    def ask(self, request: Sequence[bytes], call: Call) -> Response:
        """Send a request and wait for its answer. Raises NoResponse, and what a source or a sink raises."""
        self._parser.begin(call.sink)
        is_sent = False
        patience = contextlib.nullcontext() if call.max_silence_s is None else self._patience(call.max_silence_s)
        try:
            # A server may answer before it has read everything, and close; the answer says why.
            with patience:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._send(request)
                    is_sent = call.source is None or self._send_pieces(call.source)
                response = self._receive()
        except OSError as error:
            raise NoResponse(f"the connection is lost: {error!r}", may_be_done=True) from error
        self._parser.can_go_on &= is_sent
        return response

    def is_usable(self) -> bool:
        """Whether nothing came over it since the last answer, not even its end."""
        return not is_readable(self._socket)

    def close(self) -> None:
        """Close this process's end; a fork's is its own."""
        self._socket.close()

    @contextlib.contextmanager
    def _patience(self, max_silence_s: float) -> Iterator[None]:
        """Wait longer than usual, because a call asks for that."""
        usual = self._socket.gettimeout()
        self._socket.settimeout(None if usual is None else max(usual, max_silence_s))
        try:
            yield
        finally:
            self._socket.settimeout(usual)

    def _send_pieces(self, source: Source) -> bool:
        """Send what comes in pieces, unless the answer is there before; whether all was sent."""
        is_plain = not isinstance(self._socket, ssl.SSLSocket)  # else what comes may be TLS's own
        with contextlib.closing(source.pieces()) as pieces:
            for piece in pieces:
                if is_plain and is_readable(self._socket):
                    return False
                self._send((piece,))
        return True

    def _send(self, request: Sequence[bytes]) -> None:
        for part in request:
            left = memoryview(part)
            while left:  # not `sendall`: its time is for all of it
                left = left[self._socket.send(left) :]

    def _receive(self) -> Response:
        while True:
            data = self._socket.recv(READ_BYTES)
            if not data:
                return self._parser.end()
            response = self._parser.feed(data)
            if response is not None:
                return response


class BlockingTransport:
    """Sends calls to one server; threads may share it, and a fork has connections of its own."""

    def __init__(self, address: Address, timeout: float | None) -> None:
        self._address = address
        self._timeout = timeout
        self._context: ssl.SSLContext | None = None
        self._process = os.getpid()
        self._idle: IdleConnections[BlockingConnection] = IdleConnections()

    def send(self, call: Call) -> Response:
        """The answer. Raises NoResponse, and RuntimeError after `close`."""
        if self._process != os.getpid():
            self._begin_anew()
        idle = self._idle
        connection = idle.take() or self._connect()
        try:
            response = connection.ask(self._address.request(call), call)
        except BaseException:  # an interrupt too: what is left of the answer must not become the next one's
            connection.close()
            raise
        if connection.can_go_on:
            idle.put(connection)
        else:
            connection.close()
        return response

    def close(self) -> None:
        """Close all connections. Safe to call twice."""
        self._idle.close()

    def _begin_anew(self) -> None:
        inherited, self._idle = self._idle, IdleConnections()
        self._process = os.getpid()
        inherited.forget()

    def _connect(self) -> BlockingConnection:
        self._address.check()
        if self._address.is_secure and self._context is None:
            self._context = client_context()
        return BlockingConnection(self._address, self._context, self._timeout)
