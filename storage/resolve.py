"""From a store's URL to the store: the one resolver."""

from __future__ import annotations

import re
from pathlib import Path

from storage.base import Store, StoreUnavailable
from storage.databases import backup
from storage.databases.postgresql import open_postgresql, open_postgresql_readonly
from storage.databases.sqlite import open_sqlite, open_sqlite_readonly
from storage.in_memory import MemoryStore
from storage.sql.store import SqlStore

DATABASE_NAME = "htm.sqlite3"
"""Name of the database file within a data directory."""


LEASE_SECONDS = 10.0
"""How long an owner that says nothing is waited for, where no lock tells whether it is alive."""
FORMS = "sqlite:///PATH, postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE or memory://"

PARAMETER = re.compile(r"\?([A-Za-z_][\w-]*)=[^/]*$")
"""Behind a path: it would be part of the file's name, and may be a password. A directory may have such a name."""


def open_store(url: str, *, lease_s: float = LEASE_SECONDS) -> Store:
    """The store at `sqlite:///PATH`, `postgresql+psycopg://...` or `memory://`. Raises StoreUnavailable.

    `lease_s` is for PostgreSQL, see `open_postgresql`.
    """
    if url == "memory://":
        return MemoryStore()
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        return open_sqlite(_path(url))
    if _is_postgresql(url):
        return open_postgresql(url, lease_s)
    raise _other(url)


def open_readonly(where: Path | str) -> Store:
    """A store for reading only, beside a running server or not: a data directory, a SQLite file, or the URL of a store.

    Raises StoreUnavailable when there is none, or when it is of another version.
    """
    if isinstance(where, str) and _is_postgresql(where):
        return open_postgresql_readonly(where)
    return open_sqlite_readonly(_file(where))


def open_for_repair(where: Path | str) -> SqlStore:
    """A store that no server is using: a data directory, a SQLite file, or a URL. Raises StoreUnavailable."""
    if isinstance(where, str) and _is_postgresql(where):
        return open_postgresql(where, LEASE_SECONDS)
    file = _file(where)
    if not file.is_file():
        raise StoreUnavailable(f"there is no database at {file}")
    return open_sqlite(file)


def back_up(path: Path, target: Path) -> None:
    """Copy the database in a data directory into another one, beside a running server or not; `backup.back_up`."""
    open_readonly(path).close()  # says what is wrong with it, if anything
    backup.back_up(_file(path), target / DATABASE_NAME)


def _file(where: Path | str) -> Path:
    path = _path(where)
    if isinstance(where, str) and re.match(r"[\w+]+:", where) and not where.startswith("sqlite:") and not path.exists():
        raise _other(where)
    return path / DATABASE_NAME if path.is_dir() else path


def _path(where: Path | str) -> Path:
    if isinstance(where, str) and where.startswith("sqlite:") and (parameter := PARAMETER.search(where)):
        raise StoreUnavailable(f"a store URL of SQLite takes no parameters, and this one has {parameter[1]!r}")
    try:
        return Path(str(where).removeprefix("sqlite:///")).expanduser()
    except RuntimeError as error:
        raise StoreUnavailable(f"{where}: {error}") from error


def _other(url: str) -> StoreUnavailable:
    return StoreUnavailable(f"store URL begins with {url.partition(':')[0]!r}, it must be {FORMS}")  # no password


def _is_postgresql(url: str) -> bool:
    return url.startswith(("postgresql://", "postgresql+psycopg://"))
