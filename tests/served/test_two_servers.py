"""Two servers on the same data: one of them writes."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from htm_client import HTMClient, ServerUnavailable

from tests.served.server import Server

TOKENS = np.arange(15, dtype=np.float32).reshape(5, 3)


def test_a_frozen_server_on_sqlite_keeps_its_data(program: Server) -> None:
    """It holds the lock as long as its process is there, so nobody takes over, and it goes on when it wakes."""
    program.start()
    assert program.process is not None
    with HTMClient(program.url) as client:
        client.create_session("a", dim=3)
        client.append("a", TOKENS)
        os.kill(program.process.pid, signal.SIGSTOP)
        try:
            command = [*program.command, "--port", "0"]
            second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        finally:
            os.kill(program.process.pid, signal.SIGCONT)
        assert second.returncode == 1
        assert f"{program.data} is in use by another server, process {program.process.pid}" in second.stderr
        assert client.append("a", TOKENS).length == 10
    assert program.end(signal.SIGTERM) == 0


def test_a_frozen_server_on_postgresql_is_overtaken_and_writes_nothing_when_it_wakes(
    tmp_path: Path, postgresql_url: str
) -> None:
    flags = ("--store-url", postgresql_url, "--lease-seconds", "1")
    first, second = Server(tmp_path / "first", *flags), Server(tmp_path / "second", *flags)
    try:
        first.start()
        assert first.process is not None
        with HTMClient(first.url, retries=0) as old:
            old.create_session("a", dim=3)
            old.append("a", TOKENS)
            os.kill(first.process.pid, signal.SIGSTOP)
            second.start()
            with HTMClient(second.url) as new:
                assert new.append("a", TOKENS + 1).start == 5
                os.kill(first.process.pid, signal.SIGCONT)
                for call in (
                    lambda: old.append("a", TOKENS),
                    lambda: old.attend("a", TOKENS),
                    lambda: old.session("a"),
                ):
                    with pytest.raises(
                        ServerUnavailable, match=r"unhealthy .503.: another server owns this data since"
                    ):
                        call()
                for write in (lambda: old.fork("a", "late"), lambda: old.truncate("a", 0)):
                    with pytest.raises(ServerUnavailable, match=r"unhealthy .503."):
                        write()
                assert new.fork("a", "branch", 5).length == 5
                assert new.truncate("branch", 2).length == 2
                assert new.attend("a", TOKENS).length == 10
                memories = new.read("a")
                assert memories.length == 10
                np.testing.assert_array_equal(memories.embeddings, np.concatenate([TOKENS, TOKENS + 1]))
    finally:
        for server in (first, second):
            if server.process is not None:
                server.end(signal.SIGKILL)
