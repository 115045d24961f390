"""A real server: its own process, SQLite in a temporary directory, ended by its process id."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from api.settings import Settings

ROOT = Path(__file__).parents[2]


@functools.cache
def compile_kernel() -> None:
    """As the first of all starts leaves it: what servers compile is in the user's cache, so that none does it again."""
    folder = Settings().directory_of_kernels
    folder.mkdir(parents=True, exist_ok=True)
    code = f"from htm_service.kernels.compilation import compile_into; compile_into({str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE) as compiling:
        assert compiling.wait() == 0


class Server:
    """`htm-service serve` on `data`; the port stays the same over restarts.

    `options` are flags of `serve`, `program` is what runs it, `before` a command that runs that; `environment` is
    added to this process's.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        program: str = "api",
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.data = directory / "data"
        self.models = directory / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.log = directory / "server.log"
        self.options = list(options)
        self.program = program
        self.before = list(before)
        self.environment = dict(environment or {})
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def arguments(self) -> list[str]:
        """The command line."""
        arguments = ["serve", "--port", str(self.port), "--data", str(self.data), "--models-dir", str(self.models)]
        return [*arguments, "--device", "cpu", "--memory-budget", "256MiB", *self.options]

    @property
    def command(self) -> list[str]:
        """What runs it."""
        return [*self.before, sys.executable, "-m", self.program, *self.arguments()]

    def begin(self) -> None:
        """Start the process, without waiting until it is ready."""
        compile_kernel()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HTM_")}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment | self.environment,
                cwd=ROOT,
            )

    def first_line(self) -> str:
        """What the process prints when it is ready; empty when it ends instead."""
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        self.begin()
        line = self.first_line()
        assert line.startswith("htm-service is ready at "), self.log.read_text()
        self.port = int(line.strip().rsplit(":", 1)[1])

    def end(self, how: signal.Signals) -> int:
        """Send the process a signal; its exit code."""
        os.kill(self.pid, how)
        return self.wait()

    def wait(self, seconds: float = 30) -> int:
        """Wait until the process has ended; its exit code."""
        assert self.process is not None and self.process.stdout is not None
        code = self.process.wait(seconds)
        self.process.stdout.close()
        self.process = None
        return code

    def restart(self, how: signal.Signals) -> None:
        self.end(how)
        self.start()

    @property
    def is_running(self) -> bool:
        """Whether there is a process that has not been waited for."""
        return self.process is not None

    def close(self) -> None:
        """Kill what is left."""
        if self.is_running:
            self.end(signal.SIGKILL)
