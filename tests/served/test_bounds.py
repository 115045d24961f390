"""Clients that are slow, never come to an end, or are too many: each is ended, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from htm_client import HTMClient

from api.protocol import FILES_LEFT, MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from tests.served.forked import ForkedServer
from tests.served.server import Server

HEAD = b"POST /v1/sessions/s/attend HTTP/1.1\r\nHost: localhost\r\n"
BODY = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = ForkedServer(tmp_path_factory.mktemp("impatient"), program="tests.served.impatient")
    server.start()
    yield server
    server.close()


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def check_alive(server: Server) -> None:
    assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET", HEAD, HEAD + BODY], ids=["nothing", "a word", "half a head", "half a body"]
)
def test_who_does_not_go_on_is_ended(impatient: Server, sent: bytes) -> None:
    """uvicorn waited for ever, with a file and what had come."""
    with connected(impatient) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""
    check_alive(impatient)


def test_a_head_in_drops_is_ended(impatient: Server) -> None:
    with connected(impatient) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(HEAD)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            connection.sendall(b"X-Drop: 1\r\n")
            time.sleep(0.2)
        pytest.fail("it may send its head for ever")
    check_alive(impatient)


def test_who_reads_nothing_is_ended(impatient: Server) -> None:
    with HTMClient(impatient.url) as client:
        client.create_session("s", dim=2)
        for number in range(8):
            client.append("s", [1, number], payloads=[{"text": "x" * 3_800_000}])
    with connected(impatient) as connection:
        connection.sendall(b"GET /v1/sessions/s/memories HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3)
        assert len(read_all(connection)) < 8 * 3_800_000
    check_alive(impatient)


def is_kept(server: Server, quiet_s: float) -> bool:
    """Whether a connection over which nothing is asked for so long is answered before and after."""
    with connected(server) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for seconds in (quiet_s, 0.0):
            connection.sendall(GET)
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come one by one
                if not (piece := connection.recv(1 << 16)):
                    return False
                answer += piece
            if not answer.startswith(b"HTTP/1.1 200"):
                return False
            time.sleep(seconds)
        return True
    return False


def test_who_is_quiet_between_requests_stays(impatient: Server) -> None:
    """A busy machine may need more than its second for a head, but hardly three times one after the other."""
    assert any(is_kept(impatient, 2) for _ in range(3))


@pytest.mark.parametrize("before", [b"", GET], ids=["the first", "a later one"])
@pytest.mark.parametrize("line", [b"X-Long: " + b"x" * (8 * MAX_HEAD_BYTES), b"X-1: 1\r\n" * MAX_HEAD_BYTES])
def test_headers_of_any_size_are_refused(lasting_server: Server, before: bytes, line: bytes) -> None:
    """They were kept, all of them, for as long as they came."""
    with connected(lasting_server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(before + b"GET /livez HTTP/1.1\r\n" + line)
        answer = read_all(connection)
    assert not answer or b'"headers_too_large"' in answer  # the end may overtake the answer: not all was read
    check_alive(lasting_server)


@pytest.mark.parametrize("end", [b"\r\n", b""], ids=["whole", "not yet"])
def test_a_head_has_so_many_headers(lasting_server: Server, end: bytes) -> None:
    """16,000 fit into its bytes, and took 50 times as much for half a minute."""
    with connected(lasting_server) as connection:
        connection.sendall(GET[:-2] + b"a:\r\n" * (MAX_HEADERS - 1) + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    with connected(lasting_server) as connection:
        connection.sendall(GET[:-2] + b"a:\r\n" * (MAX_HEADERS + 1) + end)
        head, content = read_all(connection).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and json.loads(content)["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "piece",
    [b"X-1: 1\r\n" * 8_000, b"X-Long: " + b"x" * MAX_HEAD_BYTES, b"5;extension=" + b"x" * MAX_HEAD_BYTES],
    ids=["trailers", "a trailer", "a chunk's extension"],
)
def test_what_is_neither_head_nor_body_has_an_end(lasting_server: Server, piece: bytes) -> None:
    """Whoever had no key either could fill the memory: what follows the last chunk was taken for headers, and kept."""
    with connected(lasting_server) as connection:
        connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.recv(1 << 16)
        connection.sendall(b"" if piece.startswith(b"5") else b"0\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1_000):
                connection.sendall(piece)
            pytest.fail("it may send for ever")
    check_alive(lasting_server)


def test_a_trailer_is_no_header(lasting_server: Server) -> None:
    """It counted as one of the request's, though it comes after it was looked at who asks."""
    with connected(lasting_server) as connection:
        head = b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b'9\r\n{"dim":2}\r\n0\r\nContent-Encoding: gzip\r\n\r\n')
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 201 ")


def test_few_requests_wait_on_one_connection(lasting_server: Server) -> None:
    """All that came at once did, and more was read with each answer: without a key, 50 MB of them took 4 GB and held up
    everybody for half a minute.
    """
    with connected(lasting_server) as connection:
        connection.sendall(GET * MAX_PIPELINED)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < MAX_PIPELINED:
            answers += connection.recv(1 << 16)
    with connected(lasting_server) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(20):
            connection.sendall(GET * 10_000)
        pytest.fail("it may send for ever")
    check_alive(lasting_server)


def test_what_is_no_http_is_refused_as_all_else(lasting_server: Server) -> None:
    with connected(lasting_server) as connection:
        connection.sendall(b"\x16\x03\x01 a greeting of TLS\r\n\r\n")
        head, content = read_all(connection).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(content)["code"] == "malformed_body"


def test_what_strangers_send_is_not_logged(lasting_server: Server) -> None:
    """Each request that was no HTTP, or asked for another protocol, wrote up to two lines."""
    for request in (b"\x16\x03\x01\r\n\r\n", GET.replace(b"Host", b"Connection: Upgrade\r\nUpgrade: h2c\r\nHost")):
        with connected(lasting_server) as connection:
            connection.sendall(request)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 ")
    assert "WARNING" not in lasting_server.log.read_text()


def test_large_bodies_and_answers_have_room_for_so_many(tmp_path: Path) -> None:
    """Each body of 64 MiB that was announced took them at once, each answer that nobody read as long as it was not."""
    size = 10_000_000
    options = ("--max-held-bytes", "25MB", "--max-json-body-bytes", "15MB")
    server = ForkedServer(tmp_path, *options, program="api.cli")
    server.start()
    announced = BODY.replace(b"1000", b"%d" % size)
    asked = b"GET /v1/sessions/s/memories HTTP/1.1\r\nHost: localhost\r\n\r\n"
    large = {"embeddings": [1, 0], "payloads": [{"text": "x" * size}]}
    try:
        with httpx.Client(base_url=f"{server.url}/v1/sessions/s", trust_env=False, timeout=20) as client:
            client.put(f"{server.url}/v1/sessions/s", json={"dim": 2})
            for begun, of_get in ((HEAD + announced, 200), (asked, 503)):  # at first there is nothing to be read
                with contextlib.ExitStack() as stack:
                    for _ in range(2):
                        connection = stack.enter_context(connected(server))
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                        connection.sendall(begun)
                    time.sleep(1)
                    refused = client.post("/memories", json=large)
                    assert refused.status_code == 503 and refused.json()["code"] == "overloaded"
                    assert client.get("/memories").status_code == of_get
                    assert client.post("/attend", json={"queries": [1, 0]}).status_code == 200
                deadline = time.monotonic() + 20
                while (answer := client.post("/memories", json=large)).status_code != 200:
                    assert answer.status_code == 503 and time.monotonic() < deadline
                    time.sleep(0.1)
                assert len(client.get("/memories?start=0&stop=1").content) > size
    finally:
        server.close()


def test_too_many_connections_are_refused_and_the_others_served(tmp_path: Path) -> None:
    """All files of the process were theirs, and the store could open none."""
    most = 40
    server = Server(tmp_path, before=["prlimit", f"--nofile={FILES_LEFT + most}:{FILES_LEFT + most}"])
    server.start()
    try:
        with HTMClient(server.url) as client, contextlib.ExitStack() as stack:
            client.create_session("s", dim=2)
            held = [stack.enter_context(connected(server)) for _ in range(most + 20)]
            refused = held[most:]
            for connection in refused:
                head, content = read_all(connection).split(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ") and json.loads(content)["code"] == "overloaded"
            assert client.append("s", [1, 0]).length == 1
            held[0].sendall(GET)
            assert held[0].recv(1 << 16).startswith(b"HTTP/1.1 200")
        check_alive(server)
    finally:
        server.close()
