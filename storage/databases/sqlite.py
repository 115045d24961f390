"""Opening SQLite databases: files, lock, pragmas.

The pragmas and their reasons are in docs/storage.md. Does not know sessions or blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import DatabaseError

from storage.base import StoreError, StoreFull, StoreUnavailable
from storage.sql import schema
from storage.sql.failures import closed_unless_opened, json_object
from storage.sql.ownership import Ownership
from storage.sql.prepared import execute
from storage.sql.reader import Upkeep
from storage.sql.store import SqlStore

PAGE_BYTES = 16_384
VACUUM_PAGES = 512
"""Free pages given back to the file system by one step: 8 MiB."""
REWRITTEN_BYTES = 32 << 20
"""A database up to this size is rewritten after something was deleted: that takes up to 0.15 s."""
ERASE_MS = 100
"""How long erasing waits for readers that need what was deleted; then it is tried again later."""
LOG_BYTES = 64 << 20
"""The write-ahead log is cut back to this after something large went through it."""
BUSY_SECONDS = 5.0
READERS_MS = 500
"""How long closing waits for readers that are still there, to fold the log in."""
MAX_STRUCTURE_PROBLEMS = 20
MAX_POOLED_READERS = 8
MAX_READERS = 64
CLOCK = "(julianday('now') - 2440587.5) * 86400.0"
"""Seconds since the epoch, in SQL."""


def open_sqlite(path: Path) -> SqlStore:
    """The database at `path`, made if missing, owned by this process until closed. Raises StoreUnavailable."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(path)
        _roll_back(path)
        is_new = not path.exists() or path.stat().st_size == 0
    except OSError as error:
        raise StoreUnavailable(f"{path.parent} cannot be used as data directory: {_reason(path, error)}") from error
    writer = _engine(path, "rwc", "BEGIN IMMEDIATE", NullPool)
    readers = _engine(path, "ro", "BEGIN", QueuePool)
    ownership = Ownership(writer, CLOCK)  # without a lease: who holds the lock knows that nobody else is there
    store = SqlStore(f"sqlite:///{path}", writer, readers, _upkeep(path, lock.close), ownership)
    with closed_unless_opened(store, path):
        if not is_new:
            with readers.begin() as connection:  # reading only: a database of something else stays as it is
                schema.check_upgradable(connection, str(path))
        with writer.begin() as connection:
            schema.upgrade(connection, str(path))
            ownership.take(connection)
    return store


def _reason(path: Path, error: OSError) -> str:
    """Why nothing can be made at a path, naming what of it there is."""
    parents = path.absolute().parents
    present = next(some for some in parents if os.path.exists(some))  # noqa: PTH110 - Path's raises where it may not look
    if not present.is_dir():
        return f"{present} is not a directory"
    if error.errno == errno.EROFS:
        return f"{present} is on a read-only file system"
    if isinstance(error, PermissionError):
        return f"this user may not write to {error.filename or present}"
    return f"{error.strerror or error} ({present})"


def open_sqlite_readonly(path: Path) -> SqlStore:
    """The database at `path` for reading only: no lock, no upgrade, `write` fails. Raises StoreUnavailable."""
    if not path.is_file():
        raise StoreUnavailable(f"there is no database at {path}")
    readers = _engine(path, "ro", "BEGIN", NullPool)
    store = SqlStore(f"sqlite:///{path}", None, readers, _upkeep(path, lambda: None), None)
    with closed_unless_opened(store, path), readers.begin() as connection:
        schema.check(connection, str(path))
    return store


def _upkeep(path: Path, release: Callable[[], None]) -> Upkeep:
    def give_back(connection: Connection, keep_bytes: int) -> bool:
        surplus = _pragma(connection, "freelist_count") - keep_bytes // PAGE_BYTES
        if surplus > 0:
            _pragma(connection, f"incremental_vacuum({min(surplus, VACUUM_PAGES)})")
            # The file itself shrinks when the log is folded in; what readers still need stays, and nobody waits.
            _pragma(connection, "wal_checkpoint(PASSIVE)")
        return surplus > VACUUM_PAGES

    def erase(connection: Connection) -> bool:
        if not _fold(connection, ERASE_MS):
            return False
        if _pragma(connection, "page_count") * PAGE_BYTES > REWRITTEN_BYTES:
            return True
        # Where SQLite moved rows to a neighbouring page, what it left of them there is not overwritten with them.
        _execute(connection, "VACUUM")
        return _fold(connection, ERASE_MS)

    def finish(connection: Connection) -> None:
        _fold(connection, READERS_MS)

    def structure(connection: Connection) -> list[str]:
        try:
            found = connection.exec_driver_sql(f"PRAGMA quick_check({MAX_STRUCTURE_PROBLEMS})").scalars().all()
        except DatabaseError as error:  # too damaged to be looked through
            return [str(error.orig)]
        return [message for message in found if message != "ok"]

    # A commit that raises was none, here where nothing lies between the two.
    return Upkeep(
        disk_bytes=lambda: _disk_bytes(path),
        give_back=give_back,
        erase=erase,
        is_lost=lambda connection: False,
        finish=finish,
        release=release,
        structure=structure,
        has_committed=lambda transaction: False,
    )


def _fold(connection: Connection, wait_ms: int) -> bool:
    """Fold the write-ahead log in and leave it empty; False when readers needed it for so long."""
    _pragma(connection, f"busy_timeout={wait_ms}")
    try:
        return _pragma(connection, "wal_checkpoint(TRUNCATE)") == 0
    finally:
        _pragma(connection, f"busy_timeout={BUSY_SECONDS * 1_000:.0f}")


def _pragma(connection: Connection, pragma: str) -> int:
    """The first number of a pragma, or 0; as `_execute`."""
    return _execute(connection, f"PRAGMA {pragma}")


def _execute(connection: Connection, statement: str) -> int:
    """Run a statement outside of any transaction, to its end; its first number, or 0. Raises StoreError.

    Not through SQLAlchemy, which begins a transaction first.
    """
    try:
        with contextlib.closing(connection.connection.cursor()) as cursor:
            if statement.startswith("PRAGMA incremental_vacuum"):
                # Each step of the statement frees one page and has no columns; `execute` stops after the first.
                cursor.executescript(statement)
                return 0
            cursor.execute(statement)
            row = cursor.fetchone()
    except sqlite3.Error as error:
        kind = StoreFull if error.sqlite_errorname == "SQLITE_FULL" else StoreError
        raise kind(f"{statement}: {error}") from error
    return 0 if row is None else int(row[0])


def _lock(path: Path) -> IO[str]:
    """An exclusive lock beside the database, held as long as the file is open, gone when the process is."""
    path = path.resolve()  # by whatever link it was named
    file = path.with_name(path.name + ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StoreUnavailable(f"{path.parent} is in use by another server, process {holder}") from None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _roll_back(path: Path) -> None:
    """Undo what a crash interrupted while the database was made, which has a rollback journal until it has a log.

    A connection that only reads cannot, and would be refused. What is no database is said later.
    """
    if path.with_name(path.name + "-journal").exists():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()


def _engine(path: Path, mode: str, begin: str, pool: type[NullPool] | type[QueuePool]) -> Engine:
    uri = f"{path.resolve().as_uri()}?mode={mode}"

    def connect() -> sqlite3.Connection:
        # Autocommit mode: SQLAlchemy's begin event below says BEGIN, so that writers can say IMMEDIATE.
        return sqlite3.connect(
            uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )

    options: dict[str, Any] = {}
    if pool is QueuePool:
        options = {"pool_size": MAX_POOLED_READERS, "max_overflow": MAX_READERS - MAX_POOLED_READERS}
    engine = create_engine("sqlite://", creator=connect, poolclass=pool, json_deserializer=json_object, **options)
    event.listen(engine, "connect", _configure_writer if mode == "rwc" else _configure_reader)
    event.listen(engine, "begin", _begin(begin))
    return engine


def _begin(statement: str) -> Callable[[Connection], None]:
    def begin(connection: Connection) -> None:
        execute(connection, statement)

    return begin


def _configure_writer(connection: sqlite3.Connection, record: object) -> None:
    for pragma in (
        f"page_size={PAGE_BYTES}",  # these two only bind a database without tables
        "auto_vacuum=INCREMENTAL",
        "journal_mode=WAL",
        "synchronous=FULL",
        "secure_delete=ON",
        "temp_store=MEMORY",  # what VACUUM keeps aside is in no file
        f"journal_size_limit={LOG_BYTES}",
        "cache_size=-16384",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()


def _configure_reader(connection: sqlite3.Connection, record: object) -> None:
    # No mmap_size: it made reading no faster, and an error of the disk would kill the process instead of one read.
    connection.execute("PRAGMA query_only=ON")


def _disk_bytes(path: Path) -> int:
    total = 0
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            total += path.with_name(path.name + suffix).stat().st_size
    return total
