"""Opening PostgreSQL databases: connections and their settings, the lease, and what became of a commit.

What is set, and why, is in docs/storage.md. Does not know sessions or blocks.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    NullPool,
    QueuePool,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DisconnectionError

from storage.base import StoreError, StoreUnavailable
from storage.sql import schema
from storage.sql.failures import closed_unless_opened, json_object, translated
from storage.sql.ownership import Holder, Ownership
from storage.sql.prepared import execute
from storage.sql.reader import Upkeep
from storage.sql.store import SqlStore
from storage.sql.tables import metadata

CLOCK = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"
"""Seconds since the epoch, in SQL."""
CRASHED_AT = "COALESCE(CAST(pg_stat_get_bgwriter_stat_reset_time() AS VARCHAR), '')"
"""Changes when PostgreSQL recovers from a crash, of all of it or of one of its processes, and loses its statistics."""
TRANSACTION = f"CAST(pg_current_xact_id() AS VARCHAR) || '/' || {CRASHED_AT}"
OPENING_LOCK = 0x68746D
"""Held by whoever looks at the schema and the owner while opening, so that there is one at a time."""
BUSY_MS = 5_000
"""How long a group waits for someone's lock, and how long a frozen writer may hold its own."""
COMMIT_SECONDS = 10.0
"""How long it is tried to learn what became of a commit whose connection was lost."""
POLL_SECONDS = 0.2
MAX_POOLED_READERS = 4
MAX_READERS = 40
BINARY = 1
"""The format's number in the protocol; psycopg is imported by SQLAlchemy, when it is needed."""
DEFAULTS = {
    "application_name": "htm-service",
    "connect_timeout": "5",
    # A server whose machine is gone says nothing: it is given up after about ten seconds.
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""Of the connection; those of the URL win."""
TOLD = {"host", "hostaddr", "port", "dbname", "user", "options", "service", "sslmode", "target_session_attrs"}
"""Parameters of a URL that messages show."""


def open_postgresql(url: str, lease_s: float) -> SqlStore:
    """The database at `url`, owned by this process until closed or overtaken.

    Waits for the lease of an owner that may be dead, no longer than that is. Raises
    StoreUnavailable, naming the owner, when it turns out to be alive.
    """
    parsed, name = _parsed(url)
    writer = _engine(parsed, poolclass=NullPool, isolation_level="READ COMMITTED")
    event.listen(writer, "connect", _configure_writer)
    readers = _readers(parsed, poolclass=QueuePool)
    ownership = Ownership(writer, CLOCK, lease_s, TRANSACTION)
    store = SqlStore(name, writer, readers, _upkeep(writer, readers), ownership)
    with closed_unless_opened(store, name):
        _own(writer, ownership, name)
    ownership.keep()
    return store


def open_postgresql_readonly(url: str) -> SqlStore:
    """The database at `url` for reading only: no lease, no upgrade, `write` fails. Raises StoreUnavailable."""
    parsed, name = _parsed(url)
    readers = _readers(parsed, poolclass=NullPool)
    store = SqlStore(name, None, readers, _upkeep(readers, readers), None)
    with closed_unless_opened(store, name), readers.begin() as connection:
        schema.check(connection, name)
    return store


def _own(writer: Engine, ownership: Ownership, name: str) -> None:
    """Become the owner; an owner that renews its lease while it is watched is alive."""
    if (seen := _take(writer, ownership, name, None)) is None:
        return
    logging.getLogger(__name__).info("waiting for %s", seen)
    dead_at = time.monotonic() + seen.watch_s
    while True:
        time.sleep(max(0.0, min(dead_at - time.monotonic(), POLL_SECONDS)))
        holder = _take(writer, ownership, name, seen if time.monotonic() >= dead_at else None)
        if holder is None:
            return
        if holder != seen:
            raise StoreUnavailable(f"{name} is in use by another server: {holder}")


def _take(writer: Engine, ownership: Ownership, name: str, dead: Holder | None) -> Holder | None:
    """Bring the schema up to date and become the owner, unless there is one that is not known to be dead: then nothing
    is changed, and it is answered.
    """
    with writer.begin() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({OPENING_LOCK})"))
        schema.check_upgradable(connection, name)
        holder = ownership.holder(connection) if inspect(connection).has_table("owners") else None
        if holder is not None and holder != dead:
            return holder
        schema.upgrade(connection, name)
        ownership.take(connection)
    return None


def _upkeep(writer: Engine, readers: Engine) -> Upkeep:
    sizes = " + ".join(f"pg_total_relation_size('{table}')" for table in metadata.tables)

    def disk_bytes() -> int:
        with translated(), readers.connect() as connection:
            return int(connection.execute(text(f"SELECT {sizes}")).scalar_one())

    return Upkeep(
        disk_bytes=disk_bytes,
        give_back=lambda connection, keep_bytes: False,  # autovacuum does it
        erase=_vacuum_models,  # the rest it does itself, as far as it can: see docs/storage.md
        is_lost=lambda connection: _is_lost(connection.connection.dbapi_connection),
        finish=lambda connection: None,
        release=lambda: None,
        structure=lambda connection: [],
        has_committed=lambda transaction: has_committed(writer, transaction),
    )


def _vacuum_models(connection: Connection) -> bool:
    """Make room of weights that are gone: who replaces large ones all the time would wait for a minute's worth of them.

    Autovacuum looks at a table once a minute.
    """
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = True
    try:
        execute(connection, "VACUUM model_parts").close()
    finally:
        if not driver.closed:  # one that is lost has raised, and takes no more settings
            driver.autocommit = False
    return True


def has_committed(writer: Engine, transaction: str | None) -> bool:
    """Whether a transaction was committed; waits while it is on its way. Raises StoreError when nobody says.

    The number of one that a crash undid is used again: then only that it was not committed is certain.
    """
    assert transaction is not None, "PostgreSQL numbers them"
    number, _, crashed_at = transaction.partition("/")
    deadline = time.monotonic() + COMMIT_SECONDS
    query = text(f"SELECT pg_xact_status(CAST(:id AS xid8)), {CRASHED_AT}").bindparams(id=number)
    while True:
        try:
            with translated(), writer.connect() as connection:
                status, crashed_since = connection.execute(query).one()
        except StoreError:
            if time.monotonic() > deadline:
                raise
            status = "in progress"
        if status != "in progress":
            break
        time.sleep(POLL_SECONDS)
    if status == "committed" and crashed_since != crashed_at:
        raise StoreError(f"PostgreSQL crashed since, and may have given the number {number} to another transaction")
    return bool(status == "committed")


def _parsed(url: str) -> tuple[URL, str]:
    """The URL for SQLAlchemy, and how it is named to people: without passwords, of which parameters may hold more."""
    try:
        parsed = make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError) as error:
        raise StoreUnavailable(
            "the store URL cannot be parsed; it must be postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from error
    if "@" in (parsed.host or ""):  # the rest of a password, which is not to be told as a host's name
        raise StoreUnavailable("the store URL cannot be parsed: in a password, @ is written %40 and / is written %2F")
    told = {name: value for name, value in parsed.query.items() if name in TOLD}
    return parsed.set(query={**DEFAULTS, **parsed.query}), parsed.set(query=told).render_as_string(hide_password=True)


def _engine(url: URL, **options: Any) -> Engine:
    try:
        engine = create_engine(url, use_native_hstore=False, json_deserializer=json_object, **options)
    except ImportError as error:
        raise StoreUnavailable(f"a store on PostgreSQL needs psycopg ({error}): pip install '.[postgresql]'") from error
    event.listen(engine, "connect", _configure, insert=True)  # before SQLAlchemy asks for the version
    event.listen(engine, "handle_error", _close_lost_cursor)
    return engine


def _close_lost_cursor(context: ExceptionContext) -> None:
    """SQLAlchemy leaves the cursor of a lost connection open, and psycopg warns of it whenever it is collected."""
    execution = context.execution_context
    if context.is_disconnect and execution is not None and execution.cursor is not None:
        execution.cursor.close()


def _configure(connection: Any, record: object) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise StoreUnavailable(f"the database has the encoding {encoding}, it must be UTF8")
    connection.cursor_factory = _binary(connection.cursor_factory)
    connection.server_cursor_factory = _binary(connection.server_cursor_factory)


def _binary(make_cursor: Callable[..., Any]) -> Callable[..., Any]:
    """Cursors to which bytes come as they are: as text they are twice as long, and read at a third of the speed."""

    def make(*arguments: Any, **named: Any) -> Any:
        cursor = make_cursor(*arguments, **named)
        cursor.format = BINARY
        return cursor

    return make


def _is_lost(connection: Any) -> bool:
    """Whether PostgreSQL, or the network, is known to have ended a connection while it was idle.

    What has arrived is looked at, and nothing is asked: no call waits for that. What was ended since then, or ends
    during a call, that call is told.
    """
    import psycopg

    arrived = select.poll()
    try:
        arrived.register(connection.fileno(), select.POLLIN)
        while arrived.poll(0):
            connection.pgconn.consume_input()  # raises where nothing more will come
    except psycopg.OperationalError:
        return True
    return False


def _readers(url: URL, **options: Any) -> Engine:
    """Each read is one snapshot, on a connection that is not known to be lost."""

    def replace_if_lost(connection: Any, record: object, proxy: object) -> None:
        if _is_lost(connection):
            raise DisconnectionError  # and the pool gives another

    def configure(connection: Any, record: object) -> None:
        connection.read_only = True

    if options["poolclass"] is QueuePool:
        options |= {"pool_size": MAX_POOLED_READERS, "max_overflow": MAX_READERS - MAX_POOLED_READERS}
    engine = _engine(url, isolation_level="REPEATABLE READ", **options)
    event.listen(engine, "connect", configure)
    event.listen(engine, "checkout", replace_if_lost)
    return engine


def _configure_writer(connection: Any, record: object) -> None:
    connection.execute(
        f"SELECT set_config('lock_timeout', '{BUSY_MS}', false),"
        f" set_config('idle_in_transaction_session_timeout', '{BUSY_MS}', false)"
    )
    # Other values than `off` wait for this server's disk at least, and someone chose them.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()
