"""`htm-service export` and `import`: whole data sets from one real server to another, stopped, begun again, damaged."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from htm_client import HTMClient
from typer.testing import CliRunner

from api.cli import build
from api.commands import transfers
from tests.served.forked import ForkedServer

DIM = 5
KEY = "the-admins-key-of-the-tests"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ForkedServer, ForkedServer]]:
    one = ForkedServer(tmp_path_factory.mktemp("one"), program="api.cli")
    other = ForkedServer(tmp_path_factory.mktemp("other"), "--api-key", KEY, program="api.cli")
    for server in (one, other):
        server.start()
    yield one, other
    for server in (one, other):
        server.close()


@pytest.fixture
def source(servers: tuple[ForkedServer, ForkedServer]) -> Iterator[HTMClient]:
    with HTMClient(servers[0].url) as client:
        client.delete_sessions(prefix="a")
        for number in range(12):
            name = f"agent.{number:02}"
            client.create_session(name, dim=DIM, labels={"even": str(number % 2 == 0)})
            client.append(name, np.full((number + 1, DIM), number, np.float32), [{"n": number}] * (number + 1))
        yield client


def run(*arguments: str, key: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = CliRunner().invoke(build(), list(arguments), env={"HTM_API_KEY": key})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_from_one_server_to_another(
    servers: tuple[ForkedServer, ForkedServer], source: HTMClient, tmp_path: Path
) -> None:
    """What is there is skipped each time; what has changed is exported anew, and not imported over another."""
    one, other = (server.url for server in servers)
    where = str(tmp_path / "files")
    assert run("export", where, "--url", one)[:2] == (0, "12 sessions exported, 0 were there, 0 failed\n")
    index = json.loads((tmp_path / "files" / "index.json").read_text())
    assert [entry["id"] for entry in index["sessions"]] == [f"agent.{number:02}" for number in range(12)]
    assert index["sessions"][3]["length"] == 4 and len(index["sessions"][3]["checksums"]["embeddings"]) == 64
    (tmp_path / "files" / "agent.04.safetensors").unlink()
    source.append("agent.05", np.ones((1, DIM)))
    assert run("export", where, "--url", one)[:2] == (0, "2 sessions exported, 10 were there, 0 failed\n")

    arguments = ("import", where, "--url", other)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "") and "there is no key" in err
    into = (*arguments, "--namespace", "moved")
    assert run(*into, "--prefix", "agent.0", key=KEY)[:2] == (0, "10 sessions imported, 0 were there, 0 failed\n")
    assert run(*into, key=KEY)[:2] == (0, "2 sessions imported, 10 were there, 0 failed\n")
    back = str(tmp_path / "back")
    got = run("export", back, "--url", other, "--namespace", "moved", "--label", "even:True", key=KEY)
    assert got[:2] == (0, "6 sessions exported, 0 were there, 0 failed\n")
    for number in range(0, 12, 2):
        name = f"agent.{number:02}.safetensors"
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()

    source.append("agent.06", np.ones((1, DIM)))
    assert run("export", where, "--url", one)[0] == 0
    code, out, err = run(*into, key=KEY)
    assert (code, out) == (1, "0 sessions imported, 11 were there, 1 failed\n")
    assert err == "htm-service: session agent.06: there is a session of this id with another content\n"


def test_what_is_wrong_with_a_directory(
    servers: tuple[ForkedServer, ForkedServer], source: HTMClient, tmp_path: Path
) -> None:
    one = servers[0].url
    assert "index.json" in run("import", str(tmp_path), "--url", one)[2]
    assert run("export", str(tmp_path), "--url", one, "--prefix", "agent.1")[0] == 0
    source.delete_sessions(prefix="agent.1")
    path = tmp_path / "agent.11.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    code, out, err = run("import", str(tmp_path), "--url", one)
    assert (code, out) == (1, "") and "has not the" in err
    path.write_bytes(data[:-1] + b"x")
    code, out, err = run("import", str(tmp_path), "--url", one)
    assert (code, out) == (1, "1 sessions imported, 0 were there, 1 failed\n")
    assert "session agent.11: the payload at position 11" in err
    path.write_bytes(data)
    assert run("import", str(tmp_path), "--url", one)[1] == "1 sessions imported, 1 were there, 0 failed\n"
    (tmp_path / "index.json").write_text('{"sessions": [{"id": "x", "file": "../x", "bytes": 1}]}')
    assert "names the file '../x'" in run("import", str(tmp_path), "--url", one)[2]
    assert run("export", str(tmp_path), "--url", "http://127.0.0.1:1")[0] == 1


def test_a_stopped_export_leaves_whole_files(
    servers: tuple[ForkedServer, ForkedServer], source: HTMClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the third session."""
    begun: list[str] = []

    class Stopped(transfers.Bars):
        def begin(self, session: str) -> None:
            begun.append(session)

        def advance(self, num: int, total: int) -> None:
            if len(begun) == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfers, "Bars", Stopped)
        assert CliRunner().invoke(build(), ["export", str(tmp_path), "--url", servers[0].url]).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "agent.00.safetensors", "agent.01.safetensors", "index.json",
    ]  # fmt: skip
    out = run("export", str(tmp_path), "--url", servers[0].url)[1]
    assert out == "10 sessions exported, 2 were there, 0 failed\n"


def test_bars_where_someone_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal())
        stderr: Terminal = sys.stderr  # type: ignore[assignment]
        with transfers.progress("export", 3, quiet) as bars:
            bars.begin("agent-7")
            bars.advance(5, 10)
        assert ("export 1 of 3: agent-7" in stderr.getvalue()) is not quiet
