"""A server made of plain sockets, which does with each connection what a test says: to see what a client sends and
to answer in ways that no good server does."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

SESSION = {
    "id": "s", "dim": 3, "chunk_size": 2, "model": "retrieval", "dtype": "float32", "open_chunk": "attend",
    "labels": {}, "ttl_s": None, "max_tokens": None, "on_full": "reject", "length": 0, "num_chunks": 0,
    "num_sealed_chunks": 0, "residency": "resident", "bytes": {"device": 0, "host": 0, "stored": 0}, "created_at": "",
    "updated_at": "", "last_used_at": "", "num_appends": 0, "num_attends": 0, "num_queries": 0,
}  # fmt: skip


class Peer:
    """The server's end of one connection; `number` counts connections from 0."""

    def __init__(self, connected: socket.socket, number: int) -> None:
        self.socket = connected
        self.number = number
        self.received = bytearray()

    def read(self) -> bytes:
        """One request, whole; empty when the client has gone."""
        while (end := self.received.find(b"\r\n\r\n")) < 0:
            if not self.receive():
                return b""
        head = self.received[: end + 4]
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = len(head) + int(lengths[0] if lengths else 0)
        while len(self.received) < size:
            if not self.receive():
                return b""
        request = bytes(self.received[:size])
        del self.received[:size]
        return request

    def receive(self, num_bytes: int = 1 << 20) -> bool:
        """Take what has come of a request; False when the client has gone."""
        data = self.socket.recv(num_bytes)
        self.received += data
        return bool(data)

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)


Serve = Callable[[Peer], None]


class WireServer:
    """Serves each connection in a thread; keeps the requests that `answering` read, and how many connections came."""

    def __init__(self, serve: Serve, context: ssl.SSLContext | None = None) -> None:
        self.serve = serve
        self.context = context
        self.num_connections = 0
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://{self.address}"

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listener.accept()
                self.open.append(connected)
                peer = Peer(connected, self.num_connections)
                self.num_connections += 1
                threading.Thread(target=self.run, args=(peer,), daemon=True).start()

    def run(self, peer: Peer) -> None:
        with contextlib.suppress(OSError):
            if self.context is not None:
                peer.socket = self.context.wrap_socket(peer.socket, server_side=True)
                self.open.append(peer.socket)
            self.serve(peer)
        peer.socket.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connected in self.open:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            connected.close()


@contextlib.contextmanager
def serving(serve: Serve, context: ssl.SSLContext | None = None) -> Iterator[WireServer]:
    """Such a server, until the end of the block."""
    server = WireServer(serve, context)
    try:
        yield server
    finally:
        server.close()


def body_of(session: str = "s") -> bytes:
    """What a server says of a session."""
    return json.dumps(SESSION | {"id": session}).encode()


def answer(content: bytes | None = None, status: str = "200 OK", **headers: Any) -> bytes:
    """An answer with a length."""
    content = body_of() if content is None else content
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{lines}\r\n".encode() + content


def session_in(request: bytes) -> str:
    """Whose request it is."""
    return request.split(b" ", 2)[1].split(b"/")[-1].decode()


def echoing(peer: Peer) -> None:
    """Answers each request for a session with that session."""
    while request := peer.read():
        peer.write(answer(body_of(session_in(request))))
