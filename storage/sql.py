"""The contract on a SQL database, through SQLAlchemy Core: one connection writes, a pool reads.

Does not know which database it is (see `sqlite.py`), nor what the settings mean.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from sqlalchemy import Connection, Engine, Select, and_, func, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage import verification
from storage.base import (
    Block,
    Outcome,
    Problem,
    SessionRow,
    Store,
    StoreDamaged,
    StoreError,
    StoreFull,
    Totals,
    Write,
)
from storage.group import WriteGroup, row_of
from storage.tables import blocks, payloads, sessions

ROWS_AT_ONCE = 64
"""Blocks fetched together while streaming; each is at most `group.BLOCK_BYTES`, or one token."""
POSITIONS_AT_ONCE = 500
VACUUM_PAGES = 512
"""Free pages given back to the file system after one commit: bounds the pause."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise the driver's errors as StoreFull or StoreError."""
    try:
        yield
    except DBAPIError as error:
        name = getattr(error.orig, "sqlite_errorname", type(error.orig).__name__)
        if name == "SQLITE_FULL":
            raise StoreFull(f"the disk is full: {error.orig}") from error
        raise StoreError(f"{error.orig} ({name})") from error
    except SQLAlchemyError as error:
        raise StoreError(str(error)) from error


class SqlStore(Store):
    """See the head of this module. `on_close` releases what belongs to the store besides its connections."""

    durable = True

    def __init__(
        self,
        url: str,
        writer: Engine,
        readers: Engine,
        *,
        disk_bytes: Callable[[], int],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.url = url
        self._writer_engine = writer
        self._readers = readers
        self._disk_bytes = disk_bytes
        self._on_close = on_close
        self._writer: Connection | None = None
        self._write_lock = threading.Lock()
        self._has_free_pages = True
        """Until it is known better: the last process may have died before it gave them back."""

    def write(self, writes: Sequence[Write], *, now: float) -> list[Outcome]:
        """See `Store.write`."""
        with self._write_lock, translated():
            if self._writer is None:
                self._writer = self._writer_engine.connect()
            with self._writer.begin():
                group = WriteGroup(self._writer, writes, now)
                outcomes = group.run()
            self._has_free_pages |= group.has_deleted
            self._give_pages_back(VACUUM_PAGES)
            return outcomes

    def get_session(self, session_id: str) -> SessionRow | None:
        """See `Store.get_session`."""
        with translated(), self._readers.connect() as connection:
            row = connection.execute(select(sessions).where(sessions.c.id == session_id)).first()
            return None if row is None else row_of(row)

    def list_sessions(
        self, *, prefix: str = "", labels: Mapping[str, str] | None = None, after: str = "", limit: int = 100
    ) -> list[SessionRow]:
        """See `Store.list_sessions`. Labels are compared here: no two databases spell that alike in SQL."""
        wanted = (labels or {}).items()
        found: list[SessionRow] = []
        query = select(sessions).where(sessions.c.id > after).order_by(sessions.c.id)
        if prefix:
            query = query.where(func.substr(sessions.c.id, 1, len(prefix)) == prefix, sessions.c.id >= prefix)
        with translated(), self._readers.connect() as connection:
            for row in connection.execution_options(yield_per=min(limit, 500)).execute(query):
                session = row_of(row)
                if wanted <= session.settings.get("labels", {}).items():
                    found.append(session)
                if len(found) == limit:
                    break
        return found

    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """See `Store.read_blocks`."""
        with translated(), self._readers.connect() as connection:
            for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(_blocks_query(sid, start, stop)):
                if row.start + row.num_tokens <= start:
                    continue
                if zlib.crc32(row.data) != row.checksum:
                    raise StoreDamaged(f"{self._name(sid)} is damaged at position {row.start}: its checksum is wrong")
                yield Block(row.start, row.num_tokens, row.data, row.episode)

    def read_payloads(self, sid: int, positions: Sequence[int]) -> dict[int, bytes]:
        """See `Store.read_payloads`."""
        found: dict[int, bytes] = {}
        query = select(payloads.c.position, payloads.c.body).where(payloads.c.sid == sid)
        with translated(), self._readers.connect() as connection:
            for place in range(0, len(positions), POSITIONS_AT_ONCE):
                some = positions[place : place + POSITIONS_AT_ONCE]
                rows = connection.execute(query.where(payloads.c.position.in_(some)))
                found.update((row.position, row.body) for row in rows)
        return found

    def read_payload_range(self, sid: int, start: int, stop: int) -> dict[int, bytes]:
        """See `Store.read_payload_range`."""
        inside = and_(payloads.c.sid == sid, payloads.c.position >= start, payloads.c.position < stop)
        with translated(), self._readers.connect() as connection:
            rows = connection.execute(select(payloads.c.position, payloads.c.body).where(inside))
            return {row.position: row.body for row in rows}

    def totals(self) -> Totals:
        """See `Store.totals`."""
        sums = select(func.count(), func.sum(sessions.c.length), func.sum(sessions.c.num_bytes)).select_from(sessions)
        with translated(), self._readers.connect() as connection:
            num_sessions, num_tokens, num_bytes = connection.execute(sums).one()
        return Totals(num_sessions, int(num_tokens or 0), int(num_bytes or 0), self._disk_bytes())

    def verify(self) -> Iterator[Problem]:
        """See `Store.verify`; one snapshot."""
        with translated(), self._readers.connect() as connection:
            yield from verification.problems(connection)

    def close(self) -> None:
        """Give free pages back, fold the write-ahead log into the file, release the lock."""
        with self._write_lock:
            if self._writer is not None:
                with contextlib.suppress(StoreError), translated():
                    self._give_pages_back(1 << 20)
                    self._writer.rollback()
                self._writer.close()
                self._writer = None
        self._readers.dispose()
        self._writer_engine.dispose()
        self._on_close()

    def _give_pages_back(self, num_pages: int) -> None:
        """Return up to `num_pages` free pages to the file system (the database must be in autocommit)."""
        if not self._has_free_pages or self._writer is None:
            return
        raw = self._writer.connection.cursor()
        try:
            raw.execute(f"PRAGMA incremental_vacuum({num_pages})")
            raw.fetchall()
            raw.execute("PRAGMA freelist_count")
            self._has_free_pages = raw.fetchall()[0][0] > 0
        finally:
            raw.close()

    def _name(self, sid: int) -> str:
        with self._readers.connect() as connection:
            session_id = connection.execute(select(sessions.c.id).where(sessions.c.sid == sid)).scalar()
        return f"session {session_id!r}"


def _blocks_query(sid: int, start: int, stop: int | None) -> Select[tuple[int, int, int | None, int, bytes]]:
    """The blocks from the one that holds position `start` on."""
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.episode, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == sid).order_by(blocks.c.start)
    if start > 0:
        first = select(func.max(blocks.c.start)).where(blocks.c.sid == sid, blocks.c.start <= start)
        query = query.where(blocks.c.start >= func.coalesce(first.scalar_subquery(), 0))
    return query if stop is None else query.where(blocks.c.start < stop)
