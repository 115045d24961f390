"""`export` and `import_` of both clients, over their own connections, over httpx, and in process."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from htm_client import (
    AsyncHTMClient,
    ConnectionFailed,
    FileFailed,
    HTMClient,
    InvalidRequest,
    NotFound,
    SessionConflict,
    UnreadableAnswer,
    files,
)

from tests.served.forked import ForkedServer
from tests.served.wire import Peer, serving
from tests.session_files import session_file

DIM = 64
TOKENS = np.random.default_rng(1).standard_normal((20_000, DIM)).astype(np.float32)
PAYLOADS: list[Any] = [{"n": number} if number % 3 else None for number in range(len(TOKENS))]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ForkedServer]]:
    """One to export from, and one to import into, whose sessions have another dtype by default."""
    made = [
        ForkedServer(tmp_path_factory.mktemp("one"), program="api.cli"),
        ForkedServer(tmp_path_factory.mktemp("other"), "--dtype", "float16", program="api.cli"),
    ]
    for server in made:
        server.start()
    with HTMClient(made[0].url) as client:
        client.create_session(
            "s", dim=DIM, chunk_size=8, labels={"agent": "7"}, max_tokens=18_000, on_full="evict_oldest"
        )
        for start in range(0, len(TOKENS), 5_000):
            some = slice(start, start + 5_000)
            client.append("s", TOKENS[some], PAYLOADS[some], episode=start)
    yield made
    for server in made:
        server.close()


@pytest.fixture(params=["sync", "async", "sync over httpx", "async over httpx"])
def run(request: pytest.FixtureRequest) -> Run:
    """Makes one call with a client."""
    over_httpx = "httpx" in request.param

    async def run_async(url: str, call: Callable[[Any], Any], **options: Any) -> Any:
        if over_httpx:
            options["transport"] = httpx.AsyncHTTPTransport()
        async with AsyncHTMClient(url, **options) as client:
            return await call(client)

    def run_sync(url: str, call: Callable[[Any], Any], **options: Any) -> Any:
        if over_httpx:
            options["transport"] = httpx.HTTPTransport()
        with HTMClient(url, **options) as client:
            return call(client)

    if request.param.startswith("async"):
        return lambda url, call, **options: asyncio.run(run_async(url, call, **options))
    return run_sync


def test_from_one_server_into_another(run: Run, servers: list[ForkedServer], tmp_path: Path) -> None:
    one, other = servers
    path = tmp_path / "s.safetensors"
    assert run(one.url, lambda client: client.export("s", path)) == path
    run(other.url, lambda client: client.delete_sessions(prefix="copy"))
    info = run(other.url, lambda client: client.import_("copy", str(path), progress=False))
    assert (info.length, info.dtype, info.labels) == (len(TOKENS), "float32", {"agent": "7"})
    assert info.first_position == 2_000
    with HTMClient(one.url) as source, HTMClient(other.url) as copy:
        for options in ({}, {"stop": 15_000}, {"episodes": [5_000]}):
            asked: Any = {"returns": ["output", "payloads"], "top_k": 5, **options}
            left, right = source.attend("s", TOKENS[:3], **asked), copy.attend("copy", TOKENS[:3], **asked)
            np.testing.assert_array_equal(left.output, right.output)
            assert left.recalled == right.recalled
    again = run(other.url, lambda client: client.export("copy", tmp_path / "again"))
    assert again.read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "s.safetensors"]


def test_what_is_refused(run: Run, servers: list[ForkedServer], tmp_path: Path) -> None:
    """The file that was there stays; what is wrong with the other one is told."""
    one, path = servers[0], tmp_path / "file"
    path.write_bytes(b"what was there")
    with pytest.raises(NotFound):
        run(one.url, lambda client: client.export("nobody", path))
    assert path.read_bytes() == b"what was there" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InvalidRequest, match="no session's"):
        run(one.url, lambda client: client.import_("new", path))
    path.write_bytes(session_file())
    with pytest.raises(SessionConflict):
        run(one.url, lambda client: client.import_("s", path))
    with pytest.raises(FileNotFoundError):
        run(one.url, lambda client: client.import_("new", tmp_path / "nothing"))
    with pytest.raises(FileFailed, match="No such file"):
        run(one.url, lambda client: client.export("s", tmp_path / "nowhere" / "file"))


def test_a_file_that_cannot_be_read_to_its_end(run: Run, servers: list[ForkedServer], tmp_path: Path) -> None:
    """The connection ends in the middle of the body, and the server keeps nothing of it."""
    path = tmp_path / "file"
    data = session_file(TOKENS, [b""] * len(TOKENS), [1] * len(TOKENS), dim=DIM)
    path.write_bytes(data)

    def shorten(num: int, total: int | None) -> None:
        if num:
            path.write_bytes(data[:1000])

    source = files.FileSource(path, shorten)
    with pytest.raises(FileFailed, match="became shorter"):
        list(source.pieces())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "bar", None)
        patch.setattr("htm_client.client.FileSource", lambda *_: source)
        patch.setattr("htm_client.aio.FileSource", lambda *_: source)
        path.write_bytes(data)
        with pytest.raises(FileFailed, match="became shorter"):
            run(servers[1].url, lambda client: client.import_("torn", path))
    with HTMClient(servers[1].url) as client, pytest.raises(NotFound):
        client.session("torn")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_is_refused_is_not_sent_to_its_end(
    kind: str, servers: list[ForkedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes while the body goes."""
    path, gone = tmp_path / "file", [0]
    with path.open("wb") as file:
        file.truncate(1 << 30)
    source = files.FileSource(path, lambda num, total: gone.append(num))
    monkeypatch.setattr("htm_client.client.FileSource", lambda *_: source)
    monkeypatch.setattr("htm_client.aio.FileSource", lambda *_: source)

    async def use() -> None:
        async with AsyncHTMClient(servers[0].url) as client:
            with pytest.raises(SessionConflict):
                await client.import_("s", path)
            assert (await client.session("s")).length == len(TOKENS)

    if kind == "async":
        asyncio.run(use())
    else:
        with HTMClient(servers[0].url) as client:
            with pytest.raises(SessionConflict):
                client.import_("s", path)
            assert client.session("s").length == len(TOKENS)
    assert max(gone) < 1 << 29


def test_an_answer_that_breaks_off_leaves_no_file(run: Run, tmp_path: Path) -> None:
    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(500))

    with serving(serve) as server, pytest.raises(ConnectionFailed):
        run(server.url, lambda client: client.export("s", tmp_path / "file"), retries=0)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_broke_off_is_begun_again(run: Run, tmp_path: Path) -> None:
    answers = iter([bytes(500), bytes(1000)])

    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + next(answers))

    with serving(serve) as server:
        run(server.url, lambda client: client.export("s", tmp_path / "file"), retries=1)
    assert (tmp_path / "file").read_bytes() == bytes(1000)


def test_an_import_whose_answer_is_lost_is_not_sent_again(run: Run, tmp_path: Path) -> None:
    """It would meet its own session, and seem to have failed."""
    path = tmp_path / "file"
    path.write_bytes(session_file())
    asked: list[Any] = []

    def serve(peer: Peer) -> None:
        asked.append(peer.read())

    with serving(serve) as server, pytest.raises(ConnectionFailed):
        run(server.url, lambda client: client.import_("s", path), retries=3)
    assert len(asked) == 1


def test_what_is_no_file(run: Run, tmp_path: Path) -> None:
    def serve(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    with serving(serve) as server, pytest.raises(UnreadableAnswer):
        run(server.url, lambda client: client.export("s", tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [HTMClient, AsyncHTMClient])
def test_in_process(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(session_file())

    async def use() -> None:
        async with AsyncHTMClient(":memory:") as client:
            assert (await client.import_("s", tmp_path / "file")).length == 3
            await client.export("s", tmp_path / "again")

    if kind is AsyncHTMClient:
        asyncio.run(use())
    else:
        with HTMClient(":memory:") as client:
            assert client.import_("s", tmp_path / "file").length == 3
            client.export("s", tmp_path / "again")
    assert (tmp_path / "again").read_bytes()[-14:] == b'{"n":0}{"n":2}'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_where_someone_looks(
    servers: list[ForkedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTMClient(servers[0].url) as client:
        for is_wanted, stderr in ((True, Terminal()), (False, Terminal()), (True, io.StringIO())):
            monkeypatch.setattr(sys, "stderr", stderr)
            client.export("s", tmp_path / "file", progress=is_wanted)
            shown = stderr.getvalue()
            assert ("export s" in shown) is (is_wanted and stderr.isatty()), shown
        silent = Terminal()
        monkeypatch.setattr(sys, "stderr", silent)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        client.export("s", tmp_path / "file")
        assert silent.getvalue() == ""
