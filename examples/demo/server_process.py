"""The demo's server: a process of its own, started, killed, started again, stopped.

Does not know what is asked of it.
"""

from __future__ import annotations

import selectors
import subprocess
import sys
from pathlib import Path
from typing import IO

READY = "htm-service is ready at "
START_SECONDS = 120.0
"""A cold disk and a first import of torch take their time."""
STOP_SECONDS = 30.0


class ServerProcess:
    """`htm-service serve` on a data directory, logging to `log`. Raises OSError when it does not start."""

    def __init__(self, data: Path, log: Path, port: int = 0) -> None:
        self.data = data
        self.log = log
        self.port = port
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it says that it is ready; the port stays the same from the first start on."""
        command = [sys.executable, "-m", "api", "serve", "--port", str(self.port), "--data", str(self.data)]
        with self.log.open("a") as log:
            # In a session of its own: Ctrl-C is the demo's, which then ends the server.
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        line = _first_line(self._process)
        if not line.startswith(READY):
            self.kill()
            raise OSError(f"the server did not start: {self.log.read_text().strip()[-500:] or 'it said nothing'}")
        self.url = line.removeprefix(READY).strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._started.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it at once with SIGKILL, which no process can answer; nothing happens when it has ended."""
        self._started.kill()
        self._wait()

    def stop(self) -> int:
        """Ask it to stop with SIGTERM; its exit code. One that does not stop is killed, and its code is not 0."""
        self._started.terminate()
        try:
            return self._wait()
        except subprocess.TimeoutExpired:
            self.kill()
            return self._started.returncode

    @property
    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _wait(self) -> int:
        code = self._started.wait(STOP_SECONDS)
        if self._started.stdout is not None:
            self._started.stdout.close()
        return code


def _first_line(process: subprocess.Popen[str]) -> str:
    """What it says first, or "" when it ends or START_SECONDS pass before that."""
    output: IO[str] | None = process.stdout
    if output is None:
        return ""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        return output.readline() if selector.select(START_SECONDS) else ""
