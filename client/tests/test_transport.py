"""Connections of the clients' own, against a server of plain sockets: how they are used again, and when not."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from htm_client import AsyncHTMClient, ConnectionFailed, HTMClient, InvalidArgument, RequestRefused, UnreadableAnswer
from htm_client.transport import connections

from tests.served.wire import Peer, WireServer, answer, body_of, echoing, serving, session_in

CERTIFICATE = Path(__file__).parent / "certificate.pem"
Run = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    """Makes calls with either client: `do` takes the client, and a function that awaits where there is need."""

    def run_sync(url: str, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        with HTMClient(url, **options) as client:
            return [call(client) for call in calls]

    async def run_async(url: str, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        async with AsyncHTMClient(url, **options) as client:
            return [await call(client) for call in calls]

    if request.param == "sync":
        return run_sync
    return lambda url, *calls, **options: asyncio.run(run_async(url, *calls, **options))


def session(client: Any) -> Any:
    return client.session("s")


def ask(name: str) -> Callable[[Any], Any]:
    return lambda client: client.session(name)


# --- answers ---


def test_a_connection_carries_one_request_after_the_other(run: Run) -> None:
    with serving(echoing) as server:
        assert [info.id for info in run(server.url, ask("a"), ask("b"), ask("c"))] == ["a", "b", "c"]
        assert server.num_connections == 1


def chunked(content: bytes, size: int) -> bytes:
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    lines = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + lines + b"0\r\nContent-Type: x/trailer\r\n\r\n"


ANSWERS = {
    "length": answer(),
    "chunked": chunked(body_of(), 7),
    "after 100 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(),
    "two headers of a name": answer(Server_Timing="a;dur=1\r\nServer-Timing: b;dur=2"),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("in_bytes", [False, True], ids=["whole", "byte by byte"])
def test_forms_of_an_answer(run: Run, kind: str, in_bytes: bool) -> None:
    def serve(peer: Peer) -> None:
        while peer.read():
            for piece in (
                (ANSWERS[kind][at : at + 1] for at in range(len(ANSWERS[kind]))) if in_bytes else [ANSWERS[kind]]
            ):
                peer.write(piece)

    with serving(serve) as server:
        assert [info.id for info in run(server.url, session, session)] == ["s", "s"]
        assert server.num_connections == 1


@pytest.mark.parametrize("first_line", [b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK\r\nConnection: close"])
def test_an_answer_that_ends_with_the_connection(run: Run, first_line: bytes) -> None:
    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(first_line + b"\r\n\r\n" + body_of())

    with serving(serve) as server:
        assert [info.id for info in run(server.url, session, session, retries=0)] == ["s", "s"]
        assert server.num_connections == 2


def test_a_server_that_says_close_is_not_asked_again_there(run: Run) -> None:
    def serve(peer: Peer) -> None:
        while peer.read():
            peer.write(answer(body_of(str(peer.number)), Connection="close"))

    with serving(serve) as server:
        assert [info.id for info in run(server.url, session, session)] == ["0", "1"]


def test_no_content(run: Run) -> None:
    def serve(peer: Peer) -> None:
        while peer.read():
            peer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    with serving(serve) as server:
        assert run(server.url, *[lambda client: client.delete_session("s")] * 2) == [None, None]
        assert server.num_connections == 1


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_what_was_not_asked_for_is_nobodys_answer(run: Run, later: bool) -> None:
    """A second answer in the stream would be taken for that of the next request."""

    def serve(peer: Peer) -> None:
        while request := peer.read():
            peer.write(answer(body_of(session_in(request))) + (b"" if later else answer(body_of("stranger"))))
            if later:
                time.sleep(0.05)
                peer.write(answer(body_of("stranger")))

    def wait(client: Any) -> Any:
        time.sleep(0.2)
        return client.session("b")

    with serving(serve) as server:
        assert [info.id for info in run(server.url, ask("a"), wait, retries=0)] == ["a", "b"]
        assert server.num_connections == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"HTTP/1.1 200", answer()[:-1], chunked(body_of(), 9)[:-20], b"220 smtp.example.org ESMTP\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (100 << 10),
    ],
    ids=["nothing", "half a line", "a byte short", "chunks short", "smtp", "upgrade", "two lengths", "endless head"],
)  # fmt: skip
def test_answers_that_are_none(run: Run, sent: bytes) -> None:
    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(sent)

    with serving(serve) as server, pytest.raises(ConnectionFailed):
        run(server.url, session, retries=0)


def test_an_answer_that_is_compressed_though_nobody_asked(run: Run) -> None:
    def serve(peer: Peer) -> None:
        assert b"Accept-Encoding: identity" in peer.read()
        peer.write(answer(b"\x1f\x8b", Content_Encoding="gzip"))

    with serving(serve) as server, pytest.raises(UnreadableAnswer, match="compressed"):
        run(server.url, session, retries=0)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_bodies_both_ways(run: Run, is_chunked: bool) -> None:
    seen: list[bytes] = []

    def serve(peer: Peer) -> None:
        while request := peer.read():
            seen.append(request)
            content = b'{"models": [{"name": "%s"}]}' % (b"x" * (20 << 20))
            peer.write(chunked(content, 1 << 20) if is_chunked else answer(content))

    with serving(serve) as server:
        large = np.ones((1 << 12, 1 << 10), np.float32)  # 16 MiB
        call = [lambda client: client.info(), lambda client: client.append("s", large)]
        with pytest.raises(UnreadableAnswer):  # the append's answer is none of an append
            run(server.url, *call)
        assert server.num_connections == 1 and len(seen[1]) > large.nbytes


def test_a_server_that_answers_before_it_has_read(run: Run) -> None:
    """And closes: its answer says what was wrong with the request."""

    def serve(peer: Peer) -> None:
        peer.socket.recv(1000)
        peer.write(answer(b'{"code": "body_too_large", "detail": "no"}', "413 Content Too Large"))
        time.sleep(0.2)

    with serving(serve) as server, pytest.raises(RequestRefused, match="body_too_large"):
        run(server.url, lambda client: client.append("s", np.ones((1 << 14, 1 << 10), np.float32)), retries=0)


# --- connections that end, are late, or are left ---


def test_an_idle_connection_that_the_server_closed_costs_nothing(run: Run) -> None:
    """Not even a new session's POST, which may not be sent twice, and without retries."""

    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(answer())

    def create(client: Any) -> Any:
        time.sleep(0.1)
        return client.create_session(dim=3)

    with serving(serve) as server:
        assert [info.id for info in run(server.url, session, create, create, retries=0)] == ["s"] * 3
        assert server.num_connections == 3


def test_a_connection_that_ends_with_the_request_on_its_way(run: Run) -> None:
    """What may be sent twice is sent again on a fresh one; what may not is an error."""
    seen: list[bytes] = []

    def serve(peer: Peer) -> None:
        while request := peer.read():
            seen.append(request)
            if len(seen) % 2 == 0:
                return
            peer.write(answer())

    with serving(serve) as server:
        assert [info.id for info in run(server.url, session, session)] == ["s", "s"]
        assert len(seen) == 3 and server.num_connections == 2
        seen.clear()
        with pytest.raises(ConnectionFailed, match="POST /v1/sessions"):
            run(server.url, session, lambda client: client.create_session(dim=3))
        assert len(seen) == 2


def test_idle_connections_grow_old(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_IDLE_S", 0.1)

    def later(client: Any) -> Any:
        time.sleep(0.2)
        return client.session("s")

    with serving(echoing) as server:
        run(server.url, session, session, later)
        assert server.num_connections == 2


def test_clients_wait_less_than_the_server() -> None:
    """Otherwise requests would meet the end of their connection."""
    assert connections.MAX_IDLE_S <= 30


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_silent_server(run: Run, where: str) -> None:
    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(answer()[:50] if where == "within" else b"")
        time.sleep(5)

    with serving(serve) as server:
        began = time.monotonic()
        with pytest.raises(ConnectionFailed, match=r"0\.3 s|timed out"):
            run(server.url, session, timeout=0.3, retries=0)
        assert time.monotonic() - began > 0.25


def test_slow_is_not_silent(run: Run) -> None:
    """Each part of an answer, and of a request, has the whole timeout."""

    def serve(peer: Peer) -> None:
        until = time.monotonic() + 2
        while time.monotonic() < until:  # of a large request, for longer than the timeout
            peer.receive(100_000)
            time.sleep(0.02)
        peer.read()
        whole = answer(b'{"start": 0, "length": 1, "num_chunks": 1}')
        for at in range(0, len(whole), 10):
            peer.write(whole[at : at + 10])
            time.sleep(0.2)

    with serving(serve) as server:
        large = np.ones((10, 1 << 20), np.float32)
        assert run(server.url, lambda client: client.append("s", large), timeout=1.5, retries=0)[0].length == 1


def test_a_connection_that_nobody_accepts() -> None:
    with serving(echoing) as server:
        url = server.url
    for client in (HTMClient(url, retries=0), HTMClient("http://name.invalid", retries=0)):
        with client, pytest.raises(ConnectionFailed, match="no connection to http"):
            client.live()


async def test_a_cancelled_call_leaves_no_answer_behind() -> None:
    def serve(peer: Peer) -> None:
        while request := peer.read():
            time.sleep(0.2 if session_in(request) == "slow" else 0)
            peer.write(answer(body_of(session_in(request))))

    with serving(serve) as server:
        async with AsyncHTMClient(server.url) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.session("slow")
            assert (await client.session("b")).id == "b"
            await asyncio.sleep(0.2)
            assert (await client.session("c")).id == "c"
            assert server.num_connections == 2


async def test_answers_are_not_mixed_up_however_calls_end() -> None:
    def serve(peer: Peer) -> None:
        rng = random.Random(peer.number)
        while request := peer.read():
            time.sleep(rng.random() * 0.01)
            whole = answer(body_of(session_in(request)))
            at = rng.randrange(len(whole))
            peer.write(whole[:at])
            time.sleep(rng.random() * 0.005)
            peer.write(whole[at:])
            if rng.random() < 0.1:
                return

    rng = random.Random(0)
    with serving(serve) as server:
        async with AsyncHTMClient(server.url) as client:

            async def one(number: int) -> bool:
                try:
                    async with asyncio.timeout(rng.random() * 0.05):
                        return (await client.session(f"s{number}")).id == f"s{number}"
                except TimeoutError:
                    return True

            async def many(first: int) -> list[bool]:
                return [await one(first + number) for number in range(30)]

            assert all(ok for row in await asyncio.gather(*(many(100 * task) for task in range(16))) for ok in row)


def test_an_interrupt_leaves_no_answer_behind() -> None:
    def serve(peer: Peer) -> None:
        while request := peer.read():
            time.sleep(0.3 if session_in(request) == "slow" else 0)
            peer.write(answer(body_of(session_in(request))))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serving(serve) as server, HTMClient(server.url) as client:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                client.session("slow")
            time.sleep(0.4)
            assert client.session("b").id == "b"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_share_a_client_and_get_their_own_answers() -> None:
    found: list[tuple[str, str]] = []
    with serving(echoing) as server, HTMClient(server.url) as client:

        def work(thread: int) -> None:
            for number in range(50):
                name = f"s{thread}-{number}"
                found.append((name, client.session(name).id))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 400 and all(name == id for name, id in found)
        assert server.num_connections <= 8


async def test_as_many_connections_as_concurrent_calls_and_256_kept() -> None:
    arrived = threading.Barrier(300)

    def serve(peer: Peer) -> None:
        for number in range(2):
            if not (request := peer.read()):
                return
            if number == 0:
                arrived.wait(30)
            peer.write(answer(body_of(session_in(request))))
        peer.read()

    with serving(serve) as server:
        async with AsyncHTMClient(server.url) as client:
            assert len(await asyncio.gather(*(client.session("s") for _ in range(300)))) == 300
            assert server.num_connections == 300
            await asyncio.gather(*(client.session("s") for _ in range(256)))
            assert server.num_connections == 300


def test_a_closed_client_says_so() -> None:
    with serving(echoing) as server:
        client = HTMClient(server.url)
        client.session("s")
        client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.session("s")

        async def closed() -> None:
            other = AsyncHTMClient(server.url)
            await other.session("s")
            await other.close()
            await other.session("s")

        with pytest.raises(RuntimeError, match="the client is closed"):
            asyncio.run(closed())


# --- addresses ---


def keeping(server_requests: list[bytes]) -> Callable[[Peer], None]:
    def serve(peer: Peer) -> None:
        while request := peer.read():
            server_requests.append(request)
            peer.write(answer())

    return serve


@pytest.mark.parametrize(("prefix", "path"), [("", ""), ("/", ""), ("/htm", "/htm"), ("/a%20b/c/", "/a%20b/c")])
def test_a_base_url_with_a_path(run: Run, prefix: str, path: str) -> None:
    seen: list[bytes] = []
    with serving(keeping(seen)) as server:
        run(f"{server.url}{prefix}", session)
        assert seen[0].startswith(b"GET %s/v1/sessions/s HTTP/1.1\r\n" % path.encode())
        assert f"Host: {server.address}\r\n".encode() in seen[0]


def test_a_user_in_the_base_url(run: Run) -> None:
    seen: list[bytes] = []
    with serving(keeping(seen)) as server:
        run(f"http://me:p%40ss@{server.address}", session)
    assert b"Authorization: Basic bWU6cEBzcw==\r\n" in seen[0]


def test_localhost_and_queries(run: Run) -> None:
    seen: list[bytes] = []
    with serving(keeping(seen)) as server, pytest.raises(UnreadableAnswer):  # it answers with a session
        run(server.url.replace("127.0.0.1", "localhost"), lambda client: client.read("s", 3, payloads=False))
    assert b"GET /v1/sessions/s/memories?start=3&include=embeddings HTTP/1.1\r\n" in seen[0]


def test_proxies_are_those_that_the_caller_names(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's are left alone, for a memory server is mostly near: what is to go through one says so."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    seen: list[bytes] = []
    with serving(keeping(seen)) as server:
        run(server.url, session, retries=0)
        with HTMClient("http://far.invalid:81", transport=httpx.HTTPTransport(proxy=server.url), retries=0) as client:
            client.session("s")
    assert seen[1].startswith(b"GET http://far.invalid:81/v1/sessions/s HTTP/1.1\r\n")


@pytest.mark.parametrize("key", ["a\r\nX: y", "a b", "", "ü"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    for make in (HTMClient, AsyncHTMClient):
        with pytest.raises(InvalidArgument, match="api_key"):
            make("http://127.0.0.1:1", api_key=key)


# --- TLS ---


@pytest.fixture
def secure() -> Iterator[WireServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with serving(echoing, context) as server:
        yield server


def test_tls(run: Run, secure: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    assert [info.id for info in run(secure.url, ask("a"), ask("b"), ask("c"))] == ["a", "b", "c"]
    assert secure.num_connections == 1


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(run: Run, secure: WireServer) -> None:
    with pytest.raises(ConnectionFailed, match="certificate"):
        run(secure.url, session)
    assert secure.num_connections == 1


def test_tls_where_the_server_speaks_none(run: Run) -> None:
    with serving(echoing) as server, pytest.raises(ConnectionFailed, match="no connection"):
        run(server.url.replace("http:", "https:"), session, retries=0, timeout=2)
