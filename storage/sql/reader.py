"""The reading half of the contract on a SQL database, through SQLAlchemy Core: a pool of connections, a snapshot each.

Does not know which database it is (see `sqlite.py`, `postgresql.py`), who writes, nor what the settings mean.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, String, Table, and_, cast, exists, func, or_, select

from storage.base import Block, CheckSettings, Problem, SessionRow, Store, StoreDamaged, StoreError, Summary, Totals
from storage.sql import journal, verification
from storage.sql.failures import translated
from storage.sql.journal import Entries, Entry, Journal, beyond, counted
from storage.sql.tables import blocks, payloads, sessions, summaries
from storage.sql.write_group import row_of

ROWS_AT_ONCE = 64
"""Blocks fetched together while streaming; each is at most `rows.BLOCK_BYTES`, or one token."""
POSITIONS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a kind of database needs besides SQL."""

    disk_bytes: Callable[[], int]
    give_back: Callable[[Connection, int], bool]
    """Return some free space to the file system, so little that nobody waits long, and leave so many bytes of it;
    True when there is more. Called outside of a transaction, raises StoreError.
    """
    finish: Callable[[Connection], None]
    """The last thing done on the connection that writes."""
    release: Callable[[], None]
    """Called when all connections are closed, maybe again."""
    structure: Callable[[Connection], Iterable[str]]
    """What is wrong with the database itself."""
    has_committed: Callable[[str | None], bool]
    """Whether the transaction of this id, whose commit was not answered, was committed. Raises StoreError."""


class SqlReader(Store):
    """See the head of this module. Who `is_owner` keeps `_journal`; anybody else reads its rows."""

    durable = True

    def __init__(self, url: str, readers: Engine, upkeep: Upkeep, *, is_owner: bool) -> None:
        self.url = url
        self._readers = readers
        self._upkeep = upkeep
        self._is_owner = is_owner
        self._journal = Journal()
        self._is_closed = False

    def get_session(self, session_id: str) -> SessionRow | None:
        """See `Store.get_session`."""
        with self._reading() as (connection, entries):
            row = connection.execute(select(sessions).where(sessions.c.id == session_id)).first()
            return None if row is None else counted(row_of(row), entries)

    def list_sessions(
        self, *, prefix: str = "", labels: Mapping[str, str] | None = None, after: str = "", limit: int = 100
    ) -> list[SessionRow]:
        """See `Store.list_sessions`. SQL only leaves out what cannot have the labels: settings without their text."""
        wanted = (labels or {}).items()
        found: list[SessionRow] = []
        query = select(sessions).where(sessions.c.id > after, sessions.c.id >= prefix).order_by(sessions.c.id)
        end = _end_of(prefix)
        if end is not None:
            query = query.where(sessions.c.id < end)
        for key, value in wanted:
            text = f"{json.dumps(key)}: {json.dumps(value)}"
            query = query.where(cast(sessions.c.settings, String).contains(text, autoescape=True))
        if limit <= 0:
            return found
        options = _streamed(min(limit, 500))
        with self._reading() as (connection, entries), connection.execute(query, **options) as rows:
            for row in rows:
                if row.settings is None:  # damaged
                    continue
                session = counted(row_of(row), entries)
                if wanted <= session.settings.get("labels", {}).items():
                    found.append(session)
                    if len(found) == limit:
                        break
        return found

    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """See `Store.read_blocks`. Holds one of the reading connections until it ends or is closed."""
        with self._reading(sid) as (connection, entries):
            yield from _read_blocks(connection, entries, sid, start, stop)

    def read_ranges(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Block]]:
        """See `Store.read_ranges`."""
        with self._reading(*{sid for sid, _, _ in ranges}) as (connection, entries):
            for place, (sid, start, stop) in enumerate(ranges):
                for block in _read_blocks(connection, entries, sid, start, stop):
                    yield place, block

    def read_episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """See `Store.read_episodes`."""
        place, before = (
            func.lag(column).over(order_by=blocks.c.start) for column in (blocks.c.start, blocks.c.episode)
        )
        inner = select(blocks.c.start, blocks.c.episode, place.label("place"), before.label("before"))
        rows = inner.where(*_of(blocks, sid), blocks.c.start < stop).subquery()
        changed = or_(rows.c.place.is_(None), rows.c.episode.is_distinct_from(rows.c.before))
        with self._reading(sid) as (connection, entries):
            query = select(rows.c.start, rows.c.episode).where(changed).order_by(rows.c.start)
            found = [(start, episode) for start, episode in connection.execute(query)]
            for entry in beyond(connection, sid, entries):
                if entry.start < stop and not (found and found[-1][1] == entry.episode):
                    found.append((entry.start, entry.episode))
            return found

    def read_summaries(self, sid: int) -> Iterator[Summary]:
        """See `Store.read_summaries`."""
        end: int | None = None
        columns = (summaries.c.first, summaries.c.num_chunks, summaries.c.checksum, summaries.c.data)
        query = select(*columns).where(*_of(summaries, sid)).order_by(summaries.c.first)
        with self._reading(sid) as (connection, _), connection.execute(query, **_streamed(ROWS_AT_ONCE)) as rows:
            for first, num_chunks, checksum, data in rows:
                if end not in (None, first) or zlib.crc32(data) != checksum:
                    return  # nothing is lost: what follows is computed again
                yield Summary(first, num_chunks, data)
                end = first + num_chunks

    def read_payloads(self, sid: int, positions: Sequence[int]) -> dict[int, bytes]:
        """See `Store.read_payloads`."""
        found: dict[int, bytes] = {}
        query = select(payloads.c.position, payloads.c.body).where(*_of(payloads, sid))
        with self._reading(sid) as (connection, entries):
            for place in range(0, len(positions), POSITIONS_AT_ONCE):
                some = positions[place : place + POSITIONS_AT_ONCE]
                rows = connection.execute(query.where(payloads.c.position.in_(some)))
                found.update((row.position, row.body) for row in rows)
            wanted = set(positions)
            found.update((at, body) for at, body in _payloads(beyond(connection, sid, entries)) if at in wanted)
        return found

    def read_payload_range(self, sid: int, start: int, stop: int) -> dict[int, bytes]:
        """See `Store.read_payload_range`."""
        inside = and_(*_of(payloads, sid), payloads.c.position >= start, payloads.c.position < stop)
        with self._reading(sid) as (connection, entries):
            rows = connection.execute(select(payloads.c.position, payloads.c.body).where(inside))
            found = {row.position: row.body for row in rows}
            new = _payloads(beyond(connection, sid, entries))
            found.update((position, body) for position, body in new if start <= position < stop)
            return found

    def totals(self) -> Totals:
        """See `Store.totals`."""
        num_held = sessions.c.length - sessions.c.first_position
        sums = select(func.count(), func.sum(num_held), func.sum(sessions.c.num_bytes)).select_from(sessions)
        with self._reading() as (connection, entries):
            num_sessions, num_tokens, num_bytes = connection.execute(sums).one()
            new = [entry for found in journal.all_beyond(connection, entries).values() for entry in found]
        num_tokens = int(num_tokens or 0) + sum(entry.num_tokens for entry in new)
        num_bytes = int(num_bytes or 0) + sum(len(entry.data) for entry in new)
        return Totals(num_sessions, num_tokens, num_bytes, self._upkeep.disk_bytes())

    def verify(self, check_settings: CheckSettings = lambda settings: None) -> Iterator[Problem]:
        """See `Store.verify`; one snapshot."""
        with self._reading() as (connection, _):
            yield from verification.problems(connection, self._upkeep.structure, check_settings)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"the store {self.url} is closed")

    @contextlib.contextmanager
    def _reading(self, *sids: int) -> Iterator[tuple[Connection, Entries]]:
        """A connection for one snapshot, and what is in the journal of these sessions, or of all when none is named.

        The journal's entries are those of a moment before the snapshot: what was folded in between is in both. Of a
        group that was committed in between its creations may be there, and its appends not yet.
        """
        self._check_open()
        entries = self._journal.of(*sids) if sids else self._journal.all()
        with translated(), self._readers.connect() as connection:
            if not self._is_owner:  # somebody else writes
                entries, _ = journal.read(connection)
            yield connection, entries


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


def _of(table: Table, sid: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """That a row is this session's, and the session is there: of a deleted one some rows may be left."""
    return table.c.sid == sid, exists(select(sessions.c.sid).where(sessions.c.sid == sid))


def _payloads(entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
    """Positions and payloads."""
    for entry in entries:
        for position, body in enumerate(entry.payloads or (), entry.start):
            if body is not None:
                yield position, body


def _read_blocks(connection: Connection, entries: Entries, sid: int, start: int, stop: int | None) -> Iterator[Block]:
    end: int | None = None
    for block, checksum in _stored_blocks(connection, entries, sid, start, stop):
        if end is None and block.start > start:  # the session begins there, or tokens are lost
            begin = select(sessions.c.first_position).where(sessions.c.sid == sid)
            end = max(start, connection.execute(begin).scalar_one())
        if end is not None and block.start > end:
            raise _damaged(connection, sid, end, f"the next tokens are those from {block.start} on")
        if zlib.crc32(block.data) != checksum:
            raise _damaged(connection, sid, block.start, "its checksum is wrong")
        end = block.start + block.num_tokens
        yield block


def _stored_blocks(
    connection: Connection, entries: Entries, sid: int, start: int, stop: int | None
) -> Iterator[tuple[Block, int]]:
    """The blocks that overlap positions start .. stop-1, each with its checksum."""
    if stop is not None and stop <= start:
        return
    is_small = stop is not None and stop - start <= ROWS_AT_ONCE  # no block is without a token
    options = {} if is_small else _streamed(ROWS_AT_ONCE)
    with connection.execute(_blocks_query(sid, start, stop), **options) as rows:
        for first, num_tokens, episode, checksum, data in rows:
            if first + num_tokens > start:
                yield Block(first, num_tokens, data, episode), checksum
    for entry in beyond(connection, sid, entries):
        if entry.end > start and (stop is None or entry.start < stop):
            yield Block(entry.start, entry.num_tokens, entry.data, entry.episode), entry.checksum


def _damaged(connection: Connection, sid: int, position: int, why: str) -> StoreDamaged:
    id_ = connection.execute(select(sessions.c.id).where(sessions.c.sid == sid)).scalar()
    return StoreDamaged(f"session {id_!r} is damaged at position {position}: {why}")


def _blocks_query(sid: int, start: int, stop: int | None) -> Select[tuple[int, int, int | None, int, bytes]]:
    """The blocks from the one that holds position `start` on."""
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.episode, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(*_of(blocks, sid)).order_by(blocks.c.start)
    if start > 0:
        first = select(func.max(blocks.c.start)).where(blocks.c.sid == sid, blocks.c.start <= start)
        query = query.where(blocks.c.start >= func.coalesce(first.scalar_subquery(), 0))
    return query if stop is None else query.where(blocks.c.start < stop)
