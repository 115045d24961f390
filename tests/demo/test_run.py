"""The demo on a part of the corpus, with real servers: a good run, another on its data, a server that forgets."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from examples.demo.questions import QUESTIONS
from examples.demo.run import run_demo
from examples.demo.server_process import ServerProcess

LIMIT = 600
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are started find the packages as this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "client")]))


def test_a_run_and_a_second_one_on_its_data_that_keeps_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.demo.run.QUESTIONS", QUESTIONS[::3])  # all of them are asked in the second run
    code = run_demo(data=tmp_path, embedder=None, keep=False, port=None, limit=LIMIT)
    text = capsys.readouterr().out
    assert code == 0, text
    assert re.search(r"killed with SIGKILL at [1-9][\d,]* acknowledged passages", text)
    assert "right after the restart: every acknowledged passage is there" in text
    assert f"all {2 * LIMIT:,} passages read back" in text
    assert "stopped with SIGTERM, exit code 0" in text
    assert re.search(r"sessions, tokens +│ 17, 1,200 ", text)
    assert "as promised" in text

    command = [sys.executable, "-m", "examples.demo", "--data", str(tmp_path), "--limit", str(LIMIT), "--keep"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    kept = re.search(r"(http://\S+)/ui shows its sessions. End it: kill (\d+)", again.stdout)
    assert kept, again.stdout + again.stderr
    pid = int(kept[2])
    try:
        assert again.returncode == 0, again.stdout
        assert "none, the data was there already" in again.stdout
        assert httpx.get(f"{kept[1]}/v1/info").json()["totals"]["tokens"] == 2 * LIMIT
        page = httpx.get(f"{kept[1]}/ui", follow_redirects=True)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until_refused(kept[1])


def wait_until_refused(url: str) -> None:
    """Until nothing listens there: the server is not our child, so it cannot be waited for."""
    for _ in range(200):
        try:
            httpx.get(f"{url}/livez")
        except httpx.TransportError:
            return
        time.sleep(0.1)
    pytest.fail(f"the server at {url} did not stop")


def test_a_server_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = ServerProcess.kill

    def kill_and_forget(server: ServerProcess) -> None:
        kill(server)
        for path in tmp_path.glob("htm.sqlite3*"):
            path.unlink()

    monkeypatch.setattr(ServerProcess, "kill", kill_and_forget)
    with pytest.raises(OSError, match=r"session_not_found|length_conflict"):
        run_demo(data=tmp_path, embedder=None, keep=False, port=None, limit=200)


def test_too_small_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="at least 200 passages, and there are 10"):
        run_demo(data=tmp_path, embedder=None, keep=False, port=None, limit=10)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = ServerProcess(tmp_path, tmp_path / "log", taken.getsockname()[1])
        with pytest.raises(OSError, match=r"the server did not start: .*cannot listen"):
            server.start()
        assert not server.is_running
