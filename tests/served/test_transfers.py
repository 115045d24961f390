"""Sessions out of a real server and into another, by clients that go, servers that are killed, and a cap on memory."""

from __future__ import annotations

import http.client
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from storage.base import STAGED
from storage.resolve import open_readonly
from tests.served.forked import ForkedServer
from tests.session_files import session_file

FILE = {"content-type": "application/x-safetensors"}
NUM = 300_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkedServer]:
    server = ForkedServer(tmp_path, program="api.cli")
    server.start()
    yield server
    server.close()


def staged(server: ForkedServer) -> int:
    """How many sessions are at rest that nobody can see."""
    store = open_readonly(server.data)
    try:
        return len(store.list_sessions(STAGED))
    finally:
        store.close()


def begin(server: ForkedServer, data: bytes, num_bytes: int) -> http.client.HTTPConnection:
    """An import of which so many bytes are sent, and at least a part of which is at rest."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("PUT", "/v1/sessions/s/import")
    connection.putheader("Content-Type", FILE["content-type"])
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[:num_bytes])
    until(lambda: staged(server) == 1)
    return connection


def until(is_so: object, seconds: float = 30) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def data() -> bytes:
    tokens = np.random.default_rng(3).standard_normal((NUM, 8), np.float32)
    return session_file(tokens, [b""] * NUM, [-1] * NUM, dim=8)


def test_a_client_that_goes_in_the_middle_leaves_nothing(server: ForkedServer, data: bytes) -> None:
    connection = begin(server, data, len(data) - 100_000)
    connection.close()
    until(lambda: staged(server) == 0)
    assert httpx.get(f"{server.url}/v1/sessions").json()["sessions"] == []
    again = httpx.put(f"{server.url}/v1/sessions/s/import", content=data, headers=FILE, timeout=60)
    assert again.status_code == 201 and again.json()["length"] == NUM


def test_a_killed_server_leaves_nothing(server: ForkedServer, data: bytes) -> None:
    connection = begin(server, data, len(data) - 100_000)
    server.end(signal.SIGKILL)
    connection.close()
    assert staged(server) == 1
    server.start()
    until(lambda: staged(server) == 0)
    assert httpx.get(f"{server.url}/v1/sessions").json()["sessions"] == []
    assert httpx.get(f"{server.url}/v1/info").json()["totals"]["tokens"] == 0
    again = httpx.put(f"{server.url}/v1/sessions/s/import", content=data, headers=FILE, timeout=60)
    assert again.status_code == 201
    assert httpx.get(f"{server.url}/v1/sessions/s/export").content == data_of(server, data)


def data_of(server: ForkedServer, data: bytes) -> bytes:
    """The same file as this server writes it: the tensors' bytes are equal, the header is spaced otherwise."""
    own = httpx.get(f"{server.url}/v1/sessions/s/export").content
    (ours, theirs) = (text[8 + int.from_bytes(text[:8], "little") :] for text in (own, data))
    assert ours == theirs
    return own


def test_who_goes_before_the_first_byte_is_not_read_for(server: ForkedServer, data: bytes) -> None:
    """A session is read for its checksums first; of the sixteen that may be at it none has gone."""
    assert httpx.put(f"{server.url}/v1/sessions/s/import", content=data, headers=FILE, timeout=60).status_code == 201
    for _ in range(40):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/v1/sessions/s/export")
        connection.close()
    until(lambda: httpx.get(f"{server.url}/v1/sessions/s/export", timeout=60).status_code == 200)


def test_a_refused_file_is_told_while_it_is_still_sent(server: ForkedServer, data: bytes) -> None:
    """The connection carries the next request, once the rest was dropped."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.put("/v1/sessions/s", json={"dim": 8}).status_code == 201
        answer = client.put("/v1/sessions/s/import", content=data, headers=FILE)
        assert (answer.status_code, answer.json()["code"]) == (409, "session_conflict")
        assert client.get("/v1/sessions/s").json()["length"] == 0


def test_a_reader_that_stops_holds_no_view_of_the_database(server: ForkedServer, data: bytes) -> None:
    """What is deleted while it waits is erased from the files, which a reader's view would prevent."""
    put = httpx.put(f"{server.url}/v1/sessions/s/import", content=data, headers=FILE, timeout=60)
    assert put.status_code == 201
    with httpx.stream("GET", f"{server.url}/v1/sessions/s/export", timeout=60) as answer:
        assert int(answer.headers["content-length"]) > 9 * NUM
        pieces = answer.iter_raw(1000)
        next(pieces)
        assert httpx.delete(f"{server.url}/v1/sessions/s", timeout=60).status_code == 204
        needle = data[-40_000:-39_000]
        until(lambda: all(needle not in path.read_bytes() for path in server.data.iterdir()))
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in pieces:
                pass
