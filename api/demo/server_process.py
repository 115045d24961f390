"""The demo's server: a process of its own, started, killed, started again, stopped.

Does not know what is asked of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

READY = "htm-service is ready at "
STOP_SECONDS = 20.0


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
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        self._process = process
        output: IO[str] = process.stdout  # type: ignore[assignment]
        line = output.readline()
        if not line.startswith(READY):
            process.wait(STOP_SECONDS)
            output.close()
            raise OSError(f"the server did not start: {self.log.read_text().strip()[-500:]}")
        self.url = line.removeprefix(READY).strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        assert self._process is not None, "the server was not started"
        code = self._process.wait(STOP_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code
