"""Event streams of a real server: what is told, readers who leave, readers who never read, and the stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from htm_client import HTMClient

from api.schemas.views import Recall
from tests.served.server import Server

DIM = 7


def told(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_a_stream_tells_what_happens_and_ends_with_the_server(server: Server) -> None:
    server.start()
    with (
        HTMClient(server.url) as client,
        httpx.stream("GET", f"{server.url}/v1/events?session=s", timeout=20, trust_env=False) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        for name in ("other", "s"):
            client.create_session(name, dim=DIM)
            client.append(name, [[1.0] * DIM] * 3)
        client.attend("s", [1.0] * DIM, note="what was it?")
        events = told(lines)
        created, appended, recalled = (next(events) for _ in range(3))
        assert created[0] == "session" and created[1]["change"] == "created"
        assert appended == ("append", {**appended[1], "session": "s", "start": 0, "length": 3, "num_chunks": 1})
        (account,) = client.recalls("s")
        assert recalled[0] == "recall" and recalled[1]["note"] == account.note == "what was it?"
        assert recalled[1]["at"] == account.at and recalled[1]["chunks"] == account.chunks
        assert set(recalled[1]) == {"session", *Recall.model_fields}, "what /recalls has of one"
        began = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 4, "a stream does not hold up the stop"
        assert list(events) == []


def test_readers_that_leave_and_readers_that_never_read(server: Server) -> None:
    """Those who leave give their place back; those who do not read hold up nobody, and no memory grows."""
    server.start()
    with HTMClient(server.url) as client:
        client.create_session("s", dim=DIM)
        client.append("s", [[1.0] * DIM] * 3)
        for _ in range(80):  # more than may read at a time
            with socket.create_connection(("127.0.0.1", server.port)) as leaving:
                leaving.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert leaving.recv(17) == b"HTTP/1.1 200 OK\r\n"
        deaf = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = resident_mib(server)
        note = "x" * 1_000
        for _ in range(600):
            client.attend("s", [1.0] * DIM, note=note)
        assert resident_mib(server) < before + 40
        for connection in deaf:
            connection.close()
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/v1/events?seconds=0.1", trust_env=False).status_code != 200:
            assert time.monotonic() < deadline
    assert server.end(signal.SIGTERM) == 0


def resident_mib(server: Server) -> float:
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
