"""A copy of a database while a server writes to it: one snapshot, written anew by SQLite.

Does not know tables.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from storage.base import StoreError, StoreUnavailable


def back_up(source: Path, target: Path) -> None:
    """Copy the database at `source` to `target`, which is there afterwards, whole and on disk, or not at all.

    Holds no lock that a writer waits for; the log of a server that writes meanwhile is folded in when this ends.
    Raises StoreUnavailable when `target` exists, StoreError when it cannot be written.
    """
    if target.exists():
        raise StoreUnavailable(f"{target} exists already; a backup does not overwrite anything")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    try:
        with contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as origin:
            # Not page by page, as SQLite's online backup does it: nothing that was deleted comes along.
            origin.execute("VACUUM INTO ?", [str(unfinished)])
    except sqlite3.Error as error:
        unfinished.unlink()
        raise StoreError(f"{source} cannot be copied to {target}: {error}") from error
    _sync(unfinished)
    unfinished.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
