"""The contract on a SQL database, through SQLAlchemy Core: one connection writes, a pool reads.

Does not know which database it is (see `sqlite.py`), nor what the settings mean.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
CLOSE_SECONDS = 2.0
"""How long closing may give free space back; the rest waits for the next start."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise the errors of driver and library as StoreFull, StoreDamaged or StoreError."""
    try:
        yield
    except DBAPIError as error:
        name = getattr(error.orig, "sqlite_errorname", type(error.orig).__name__)
        if name == "SQLITE_FULL":
            raise StoreFull(f"the disk is full: {error.orig}") from error
        raise StoreError(f"{error.orig} ({name})") from error
    except SQLAlchemyError as error:
        raise StoreError(str(error)) from error
    except json.JSONDecodeError as error:
        raise StoreDamaged(f"the settings of a session are damaged: {error}") from error
    except (OverflowError, UnicodeError) as error:  # from the driver: a number or a text it cannot express
        raise StoreError(f"a value cannot be stored: {error}") from error


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a kind of database needs besides SQL."""

    disk_bytes: Callable[[], int]
    give_back: Callable[[Connection], bool]
    """Return some free space to the file system, so little that nobody waits long; True when there is more.
    Called outside of a transaction, raises StoreError.
    """
    finish: Callable[[Connection], None]
    """The last thing done on the connection that writes."""
    release: Callable[[], None]
    """Called when all connections are closed, maybe again."""


class SqlStore(Store):
    """See the head of this module. Without `writer` it is for reading only."""

    durable = True

    def __init__(self, url: str, writer: Engine | None, readers: Engine, upkeep: Upkeep) -> None:
        self.url = url
        self._writer_engine = writer
        self._readers = readers
        self._upkeep = upkeep
        self._writer: Connection | None = None
        self._write_lock = threading.Lock()
        self._is_closed = False
        self._has_free_space = True
        """Until it is known better: the last process may have died before it gave it back."""

    def write(self, writes: Sequence[Write], *, now: float) -> list[Outcome]:
        """See `Store.write`."""
        with self._write_lock, translated():
            self._check_open()
            if self._writer_engine is None:
                raise StoreError(f"the store {self.url} was opened for reading only")
            if self._writer is None:
                self._writer = self._writer_engine.connect()
            try:
                with self._writer.begin():
                    group = WriteGroup(self._writer, writes, now)
                    outcomes = group.run()
            except BaseException:
                # Whatever state the failure left the connection in, the next group gets a fresh one.
                self._drop_writer()
                raise
            self._has_free_space |= group.has_deleted
            self._give_back()
            return outcomes

    def get_session(self, session_id: str) -> SessionRow | None:
        """See `Store.get_session`."""
        with self._reading() as connection:
            row = connection.execute(select(sessions).where(sessions.c.id == session_id)).first()
            return None if row is None else row_of(row)

    def list_sessions(
        self, *, prefix: str = "", labels: Mapping[str, str] | None = None, after: str = "", limit: int = 100
    ) -> list[SessionRow]:
        """See `Store.list_sessions`. Labels are compared here: no two databases spell that alike in SQL."""
        wanted = (labels or {}).items()
        found: list[SessionRow] = []
        query = select(sessions).where(sessions.c.id > after, sessions.c.id >= prefix).order_by(sessions.c.id)
        end = _end_of(prefix)
        if end is not None:
            query = query.where(sessions.c.id < end)
        if limit <= 0:
            return found
        with self._reading() as connection, connection.execute(query, **_streamed(min(limit, 500))) as rows:
            for row in rows:
                session = row_of(row)
                if wanted <= session.settings.get("labels", {}).items():
                    found.append(session)
                    if len(found) == limit:
                        break
        return found

    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """See `Store.read_blocks`. Holds one of the reading connections until it ends or is closed."""
        if stop is not None and stop <= start:
            return
        query = _blocks_query(sid, start, stop)
        with self._reading() as connection, connection.execute(query, **_streamed(ROWS_AT_ONCE)) as rows:
            for first, num_tokens, episode, checksum, data in rows:
                if first + num_tokens <= start:
                    continue
                if zlib.crc32(data) != checksum:
                    id_ = connection.execute(select(sessions.c.id).where(sessions.c.sid == sid)).scalar()
                    raise StoreDamaged(f"session {id_!r} is damaged at position {first}: its checksum is wrong")
                yield Block(first, num_tokens, data, episode)

    def read_payloads(self, sid: int, positions: Sequence[int]) -> dict[int, bytes]:
        """See `Store.read_payloads`."""
        found: dict[int, bytes] = {}
        query = select(payloads.c.position, payloads.c.body).where(payloads.c.sid == sid)
        with self._reading() as connection:
            for place in range(0, len(positions), POSITIONS_AT_ONCE):
                some = positions[place : place + POSITIONS_AT_ONCE]
                rows = connection.execute(query.where(payloads.c.position.in_(some)))
                found.update((row.position, row.body) for row in rows)
        return found

    def read_payload_range(self, sid: int, start: int, stop: int) -> dict[int, bytes]:
        """See `Store.read_payload_range`."""
        inside = and_(payloads.c.sid == sid, payloads.c.position >= start, payloads.c.position < stop)
        with self._reading() as connection:
            rows = connection.execute(select(payloads.c.position, payloads.c.body).where(inside))
            return {row.position: row.body for row in rows}

    def totals(self) -> Totals:
        """See `Store.totals`."""
        sums = select(func.count(), func.sum(sessions.c.length), func.sum(sessions.c.num_bytes)).select_from(sessions)
        with self._reading() as connection:
            num_sessions, num_tokens, num_bytes = connection.execute(sums).one()
        return Totals(num_sessions, int(num_tokens or 0), int(num_bytes or 0), self._upkeep.disk_bytes())

    def verify(self) -> Iterator[Problem]:
        """See `Store.verify`; one snapshot."""
        with self._reading() as connection:
            yield from verification.problems(connection)

    def close(self) -> None:
        """Give free space back for a moment, end the connections, release the rest."""
        with self._write_lock:
            self._is_closed = True
            self._readers.dispose()  # before the writer's: SQLite folds its log in when the last one closes
            if self._writer is not None:
                deadline = time.monotonic() + CLOSE_SECONDS
                while self._has_free_space and time.monotonic() < deadline:
                    self._give_back()
                with contextlib.suppress(StoreError), translated():
                    self._upkeep.finish(self._writer)
                self._drop_writer()
            if self._writer_engine is not None:
                self._writer_engine.dispose()
            self._upkeep.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"the store {self.url} is closed")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._check_open()
        with translated(), self._readers.connect() as connection:
            yield connection

    def _give_back(self) -> None:
        """One step of it. A failure is no failure of the group before it, which is on disk."""
        if not self._has_free_space or self._writer is None:
            return
        try:
            with translated():
                self._has_free_space = self._upkeep.give_back(self._writer)
        except StoreError:
            self._has_free_space = False  # until the next deletion
            self._drop_writer()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._writer.close()
            self._writer = None


def _streamed(num_rows: int) -> dict[str, Any]:
    """Options of a statement whose rows are fetched as they are taken."""
    return {"execution_options": {"yield_per": num_rows}}


def _end_of(prefix: str) -> str | None:
    """The first text, by code point, after all that begin with `prefix`; None when there is none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # UTF-8 has no surrogates


def _blocks_query(sid: int, start: int, stop: int | None) -> Select[tuple[int, int, int | None, int, bytes]]:
    """The blocks from the one that holds position `start` on."""
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.episode, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == sid).order_by(blocks.c.start)
    if start > 0:
        first = select(func.max(blocks.c.start)).where(blocks.c.sid == sid, blocks.c.start <= start)
        query = query.where(blocks.c.start >= func.coalesce(first.scalar_subquery(), 0))
    return query if stop is None else query.where(blocks.c.start < stop)
