"""A real server, forked from a process that has imported its modules, which is most of what starting takes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.served.server import Server, compile_kernel

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["api.cli", "api.serving", "api.wire.safetensors", "htm_service.engine", "storage.resolve"]
PRELOADED += ["storage.databases.sqlite"]
PRELOADED += ["numba", "uvicorn.protocols.http.httptools_impl", "uvloop", "alembic.command"]


class ForkedServer(Server):
    """As `Server`, which takes seconds longer to start; without `before`."""

    child: BaseProcess | None = None
    lines: Any = None

    @property
    def pid(self) -> int:
        assert self.child is not None and self.child.pid is not None
        return self.child.pid

    def begin(self) -> None:
        """Start the process, without waiting until it is ready."""
        compile_kernel()
        FORKS.set_forkserver_preload(PRELOADED)
        receiver, sender = FORKS.Pipe(duplex=False)
        self.child = FORKS.Process(target=serve, args=(self.program, self.arguments(), self.log, sender), daemon=True)
        self.child.start()
        sender.close()
        self.lines = os.fdopen(os.dup(receiver.fileno()))
        receiver.close()

    def first_line(self) -> str:
        return str(self.lines.readline())

    def wait(self, seconds: float = 30) -> int:
        """Wait until the process has ended; its exit code."""
        assert self.child is not None
        self.child.join(seconds)
        code = self.child.exitcode
        assert code is not None, "the server has not ended"
        self.lines.close()
        self.child.close()
        self.child = None
        return code

    @property
    def is_running(self) -> bool:
        return self.child is not None


def serve(program: str, arguments: list[str], log: Path, ready: Connection) -> None:
    """What the forked process does."""
    os.dup2(ready.fileno(), 1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    importlib.import_module(program).main(arguments)
