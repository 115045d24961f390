"""A real server: its own process, SQLite in a temporary directory, ended by its process id."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


class Server:
    """`htm-service serve` on `data`; the port stays the same over restarts."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.models = directory / "models"
        self.models.mkdir()
        self.log = directory / "server.log"
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HTM_")}
        command = [sys.executable, "-m", "api", "serve", "--port", str(self.port), "--data", str(self.data)]
        command += ["--models-dir", str(self.models), "--memory-budget", "256MiB", "--device", "cpu"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("htm-service is ready at "), self.log.read_text()
        self.port = int(line.strip().rsplit(":", 1)[1])

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None and self.process.stdout is not None
        os.kill(self.process.pid, how)
        code = self.process.wait(30)
        self.process.stdout.close()
        self.process = None
        return code

    def restart(self, how: signal.Signals) -> None:
        self.end(how)
        self.start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    if server.process is not None:
        server.end(signal.SIGKILL)
