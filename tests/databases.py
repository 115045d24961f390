"""Empty SQLite databases that are there at once: making one syncs to disk for every table."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from storage.resolve import open_store


@functools.cache
def empty_database() -> bytes:
    """The file of a store with nothing in it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.sqlite3"
        open_store(f"sqlite:///{path}").close()
        return path.read_bytes()


def new_database(path: Path) -> str:
    """Put one at `path`; the URL of its store."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(empty_database())
    return f"sqlite:///{path}"
