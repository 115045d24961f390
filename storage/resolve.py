"""From a store's URL to the store: the one resolver."""

from __future__ import annotations

from pathlib import Path

from storage.base import Store, StoreUnavailable
from storage.memory import MemoryStore
from storage.sqlite import open_sqlite, open_sqlite_readonly

DATABASE_NAME = "htm.sqlite3"
"""Name of the database file within a data directory."""


def open_store(url: str) -> Store:
    """The store at `sqlite:///PATH` or `memory://`. Raises StoreUnavailable."""
    if url == "memory://":
        return MemoryStore()
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        return open_sqlite(Path(url.removeprefix("sqlite:///")))
    scheme = url.split("://")[0]
    raise StoreUnavailable(f"store URL begins with {scheme!r}, it must be sqlite:///PATH or memory://")


def open_readonly(path: Path) -> Store:
    """The SQLite store in a data directory (or the file itself), for reading only, beside a running server or not.

    Raises StoreUnavailable when there is none, or when it is of another version.
    """
    return open_sqlite_readonly(path / DATABASE_NAME if path.is_dir() else path)
