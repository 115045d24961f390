"""The memory of the agents on a server: a session for each environment, all of them in lock-step.

The one place that knows how sessions come, grow and go, and how weights come to the server. Does not know the task.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from htm_client import HTMClient
from torch import Tensor, nn

from examples.demo.server_process import ServerProcess

MODEL = "ballet"
STEPS_AT_ONCE = 512
"""Of all environments that travel together: 8 MB at 64 environments and width 64."""


class Memory:
    """A server of its own, for sessions of one width and chunk size."""

    def __init__(self, dim: int, chunk_size: int) -> None:
        self._dim, self._chunk_size = dim, chunk_size
        self._directory = Path(tempfile.mkdtemp(prefix="htm-ballet-"))
        self._server = ServerProcess(self._directory, self._directory / "server.log")
        self._sessions: list[str] = []

    def __enter__(self) -> Self:
        """Start the server."""
        self._server.start()
        self.client = HTMClient(self._server.url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop it; nothing is left."""
        self.client.close()
        self._server.stop()
        shutil.rmtree(self._directory)

    def begin(self, num_sessions: int) -> list[str]:
        """Empty sessions, one for each environment; what they held of the episode before is gone."""
        while len(self._sessions) < num_sessions:
            session = f"environment-{len(self._sessions)}"
            self.client.create_session(session, dim=self._dim, chunk_size=self._chunk_size)
            self._sessions.append(session)
        sessions = self._sessions[:num_sessions]
        self.client.reset(sessions)
        return sessions

    def append(self, sessions: Sequence[str], tokens: Tensor) -> None:
        """Add tokens [S, T, D], T to each session."""
        for some in tokens.detach().split(STEPS_AT_ONCE, dim=1):
            self.client.batch_append(sessions, some)

    def push(self, attention: nn.Module) -> None:
        """Have the server attend with these weights from now on."""
        self.client.put_model(MODEL, attention)

    def attend(self, sessions: Sequence[str], queries: Tensor) -> Tensor:
        """The server's answers [S, D] to queries [S, D], with the weights that were pushed."""
        output = self.client.batch_attend(sessions, queries.detach(), model=MODEL).output
        return torch.tensor(output)[:, 0]
