"""Session files on this machine's disk: sent and received in pieces, with a bar that shows how far that is.

Does not know sockets, nor what is in such a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO

from htm_client.errors import FileFailed, UnreadableAnswer

PIECE_BYTES = 1 << 20
"""Read and sent at once."""

Advance = Callable[[int, int | None], None]
"""Told how many bytes of how many have gone or come."""


class FileSource:
    """A file that is sent, from its beginning each time."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._path = path
        self._advance = advance
        self.num_bytes = path.stat().st_size

    def pieces(self) -> Generator[bytes, None, None]:
        """Its bytes, as many as it had at first. Raises FileFailed, also where there are fewer now."""
        num_sent = 0
        self._advance(0, self.num_bytes)
        with _failing_clearly(self._path), self._path.open("rb") as file:
            while num_sent < self.num_bytes:
                piece = file.read(min(PIECE_BYTES, self.num_bytes - num_sent))
                if not piece:
                    raise FileFailed(f"{self._path} became shorter while it was sent")
                yield piece
                num_sent += len(piece)
                self._advance(num_sent, self.num_bytes)


class FileSink:
    """A file that is received beside its place, and put there when it is whole; a context that leaves nothing else."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._path = path
        self._beside = path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex}.part")
        self._advance = advance
        self._file: IO[bytes] | None = None
        self._num_expected: int | None = None
        self.num_bytes = 0

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()
        self._beside.unlink(missing_ok=True)

    def begin(self, num_bytes: int | None) -> None:
        """An answer begins, of so many bytes where it says so. Raises FileFailed."""
        with _failing_clearly(self._path):
            if self._file is None:
                self._file = self._beside.open("xb")
            self._file.seek(0)
            self._file.truncate()
        self.num_bytes, self._num_expected = 0, num_bytes
        self._advance(0, num_bytes)

    def write(self, part: bytes) -> None:
        """A part of it. Raises FileFailed."""
        assert self._file is not None
        with _failing_clearly(self._path):
            self._file.write(part)
        self.num_bytes += len(part)
        self._advance(self.num_bytes, self._num_expected)

    def keep(self) -> Path:
        """Put it in its place, over what is there; where that is. Raises FileFailed, UnreadableAnswer."""
        if self._file is None or self._num_expected not in (None, self.num_bytes):
            raise UnreadableAnswer(f"the answer is no file: {self.num_bytes} of {self._num_expected} bytes came")
        with _failing_clearly(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            return self._beside.replace(self._path)


@contextlib.contextmanager
def _failing_clearly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileFailed(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def bar(text: str, is_wanted: bool) -> Iterator[Advance]:
    """Shows what it is told, where someone looks at stderr and rich is there."""
    if not is_wanted or not sys.stderr.isatty():
        yield lambda num, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    except ImportError:
        yield lambda num, total: None
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=None)
        yield lambda num, total: progress.update(task, completed=num, total=total)
