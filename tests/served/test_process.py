"""The server as a process among others: its signals, its environment, its idle connections."""

from __future__ import annotations

import http.client
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.api.test_settings import OF_SERVICES
from tests.served.forked import ForkedServer
from tests.served.server import Server


def test_the_end_of_a_terminal_is_a_stop_like_others(program: Server) -> None:
    """SIGHUP killed it, with what had begun."""
    program.start()
    assert program.end(signal.SIGHUP) == 0


def test_who_ignores_hangups_goes_on_to(tmp_path: Path) -> None:
    server = Server(tmp_path, before=["nohup"])
    try:
        server.start()
        server.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]
        time.sleep(0.5)
        assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200
    finally:
        server.close()


def test_it_starts_beside_a_service_of_its_name(tmp_path: Path) -> None:
    server = Server(tmp_path, environment=OF_SERVICES)
    try:
        server.start()
        assert "HTM_SERVICE_SERVICE_HOST" in (log := server.log.read_text())
        assert "are Kubernetes' and no settings" in log
    finally:
        server.close()


@pytest.mark.parametrize(("options", "is_kept"), [([], True), (["--keep-alive-seconds", "1"], False)])
def test_idle_connections_are_kept(tmp_path: Path, options: list[str], is_kept: bool) -> None:
    """For 5 s, as long as clients keep theirs: whoever called every 5 s lost one call in sixty."""
    server = ForkedServer(tmp_path, *options, program="api.cli")
    try:
        server.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/livez")
        connection.getresponse().read()
        assert connection.sock is not None
        time.sleep(5.5 if is_kept else 2.5)
        connection.sock.settimeout(0.1)
        if is_kept:
            with pytest.raises(TimeoutError):
                connection.sock.recv(1)
        else:
            assert connection.sock.recv(1) == b"", "the server has closed it"
        connection.close()
    finally:
        server.close()
