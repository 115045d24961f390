"""One group of writes on one connection, within its transaction: few statements however many writes.

A group of small appends becomes one row of the journal. With anything larger, or a write that looks at rows, the
journal is folded first and everything goes into the tables: rows are gathered and inserted together, and any other
write flushes what was gathered before it, so that each write sees the ones before it.
Sessions and idempotency keys of all appends are looked up first. What the sessions' rows say is known from one group
to the next, because nobody else writes; each update compares it nevertheless.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, exists, insert, or_, select, update

from storage.base import (
    IDEMPOTENCY_SECONDS,
    Append,
    Appended,
    CreateSession,
    DeleteSession,
    KeyReused,
    NoSuchSession,
    Outcome,
    Refused,
    Seal,
    SessionExists,
    SessionFull,
    SessionRow,
    UpdateSession,
    Write,
    WrongLength,
    first_to_keep,
)
from storage.sql.compaction import seal
from storage.sql.deletion import leave
from storage.sql.journal import MAX_ENTRY_BYTES, Entry, Journal
from storage.sql.prepared import Values
from storage.sql.rows import BLOCK_BYTES, SIDS_AT_ONCE, Rows, lots
from storage.sql.tables import blocks, idempotency, payloads, sessions
from storage.sql.trimming import evict

PURGE_LIMIT = 500
"""Expired idempotency keys deleted with one group that brings new ones."""
KEYS_AT_ONCE = 32
"""Keys looked up by one statement. It probes the index once for each pair of a session and a key of them, which
is why it is few; a list of pairs reads better, but makes SQLite scan the whole table."""

MAX_KEY_CHARS = 512
"""Longer idempotency keys go into their table at once: one that an index refuses must not be found out by a fold."""

MAX_TALLIES = 16_384
"""Sessions of which length and bytes are known from one group to the next."""

_HAS_LEFTOVERS = or_(
    exists().where(blocks.c.sid == sessions.c.sid, blocks.c.start >= sessions.c.length),
    exists().where(payloads.c.sid == sessions.c.sid, payloads.c.position >= sessions.c.length),
)
_DELETE_KEY = delete(idempotency).where(
    idempotency.c.sid == bindparam("of_sid"), idempotency.c.key == bindparam("of_key")
)


def row_of(row: Row[Any]) -> SessionRow:
    """A row of the table as the contract's record."""
    return SessionRow(
        id=row.id,
        settings=row.settings or {},
        created_at=row.created_at,
        max_tokens=row.max_tokens,
        sid=row.sid,
        length=row.length,
        num_bytes=row.num_bytes,
        updated_at=row.updated_at,
        first_position=row.first_position,
    )


@dataclass(slots=True)
class Tally:
    """A session's length and bytes as its group leaves them, and `stored`, the length that its row has so far."""

    length: int
    num_bytes: int
    max_tokens: int | None
    first_position: int
    stored: int
    has_leftovers: bool = False
    """Whether rows lie beyond its length, which is damage; a fold that met them would fail, with all that it folds."""
    evict_chunk: int | None = None
    """Set when `first_position` has moved and what lies before it is still there."""

    @property
    def is_for_tables(self) -> bool:
        """Whether its appends go into the tables at once."""
        return self.has_leftovers or self.evict_chunk is not None


class WriteGroup:
    """See the head of this module. `run` once, then `publish` once its transaction is committed.

    `tallies`, by sid, is what the groups before have found out, and is kept up to date; it is wrong when this one's
    transaction is not committed.
    """

    def __init__(
        self,
        connection: Connection,
        writes: Sequence[Write],
        now: float,
        tallies: dict[int, Tally],
        journal: Journal,
    ) -> None:
        self._connection = connection
        self._writes = writes
        self._now = now
        self._tallies = tallies
        self._journal = journal
        self._appends = [write for write in writes if isinstance(write, Append)]
        self._is_direct = not all(_may_be_journaled(write) for write in writes)
        """Whether everything goes into the tables."""
        self._has_folded = False
        self._journaled: list[Entry] = []
        self._gathered: list[tuple[Append, Appended]] = []
        self._touched: dict[int, Tally] = {}
        """Those with tokens that were gathered."""
        self._keys: dict[tuple[int, str], tuple[bytes, Appended]] = {}

    def run(self) -> list[Outcome]:
        """Do all writes; one outcome for each."""
        horizon = self._now - IDEMPOTENCY_SECONDS
        keys = {(write.sid, write.idempotency_key) for write in self._appends if write.idempotency_key is not None}
        known = [entry for key in keys if (entry := self._journal.with_key(*key)) is not None]
        if self._is_direct or self._journal.is_full or any(entry.at <= horizon for entry in known):
            self._fold()
        if len(self._tallies) > MAX_TALLIES:
            self._tallies.clear()
        self._look_up({write.sid for write in self._appends}.difference(self._tallies))
        self._look_up_keys(keys, horizon)
        outcomes = [self._apply(write) for write in self._writes]
        self._flush()
        return outcomes

    def publish(self) -> None:
        """Let readers see what is in the journal now."""
        if self._has_folded:
            self._journal.clear()
        if self._journaled:
            self._journal.add(self._journaled)

    def _fold(self) -> None:
        if not self._has_folded:
            self._has_folded = True
            self._journal.fold(self._connection)
            for sid, entries in self._journal.all().items():
                if (tally := self._tallies.get(sid)) is not None:
                    tally.stored = entries[-1].end

    def _apply(self, write: Write) -> Outcome:
        if isinstance(write, Append):
            return self._append(write)
        if isinstance(write, CreateSession):
            return self._create(write.row)
        self._flush()
        row = self._connection.execute(select(sessions).where(sessions.c.sid == write.sid)).first()
        if row is None:
            return NoSuchSession(f"there is no session of key {write.sid}")
        if isinstance(write, UpdateSession):
            self._connection.execute(
                update(sessions).where(sessions.c.sid == write.sid).values(settings=dict(write.settings))
            )
            row = self._connection.execute(select(sessions).where(sessions.c.sid == write.sid)).one()
        elif isinstance(write, Seal):
            if (refused := seal(self._connection, write, row.first_position)) is not None:
                return refused
        else:
            self._delete(write)
        return row_of(row)

    def _create(self, row: SessionRow) -> Outcome:
        if self._connection.execute(select(sessions.c.sid).where(sessions.c.id == row.id)).first() is not None:
            return SessionExists(f"there is a session {row.id!r}")
        values = {
            "id": row.id,
            "settings": dict(row.settings),
            "max_tokens": row.max_tokens,
            "length": 0,
            "num_bytes": 0,
            "created_at": row.created_at,
            "updated_at": row.updated_at or row.created_at,
        }
        created = self._connection.execute(insert(sessions).values(values).returning(sessions)).one()
        self._tallies[created.sid] = Tally(0, 0, created.max_tokens, 0, 0)
        return row_of(created)

    def _delete(self, write: DeleteSession) -> None:
        self._connection.execute(delete(sessions).where(sessions.c.sid == write.sid))
        leave(self._connection, write.sid)
        self._tallies.pop(write.sid, None)

    def _append(self, write: Append) -> Appended | Refused:
        tally = self._tallies.get(write.sid)
        if tally is None:
            return NoSuchSession(f"there is no session of key {write.sid}")
        key = None if write.idempotency_key is None else (write.sid, write.idempotency_key)
        if key is not None and key in self._keys:
            digest, answer = self._keys[key]
            if digest != write.digest:
                return KeyReused(f"idempotency key {key[1]!r} was used with another body")
            return Appended(answer.start, answer.length, replayed=True)
        if write.if_length is not None and write.if_length != tally.length:
            return WrongLength(tally.length)
        first_position, length = tally.first_position, tally.length + write.num_tokens
        if tally.max_tokens is not None and length - first_position > tally.max_tokens:
            to_keep = first_to_keep(tally.length, write.num_tokens, tally.max_tokens, write.evict_chunk)
            if to_keep is None:
                return SessionFull(tally.length, tally.max_tokens)
            tally.first_position, tally.evict_chunk = to_keep, write.evict_chunk
        answer = Appended(tally.length, length, first_position=tally.first_position)
        self._gathered.append((write, answer))
        if key is not None:
            self._keys[key] = (write.digest, answer)
        tally.length = answer.length
        tally.num_bytes += len(write.data)
        self._touched[write.sid] = tally
        return answer

    def _look_up(self, sids: set[int]) -> None:
        table = sessions.c
        columns = (table.sid, table.length, table.num_bytes, table.max_tokens, table.first_position, _HAS_LEFTOVERS)
        entries = {} if self._has_folded else self._journal.of(*sids)
        for some in lots(sids, SIDS_AT_ONCE):
            rows = self._connection.execute(select(*columns).where(sessions.c.sid.in_(some)))
            for sid, length, num_bytes, max_tokens, first_position, has_leftovers in rows:
                tally = Tally(length, num_bytes, max_tokens, first_position, length, bool(has_leftovers))
                self._tallies[sid] = tally
                for entry in entries.get(sid, ()):
                    tally.length = entry.end
                    tally.num_bytes += len(entry.data)

    def _look_up_keys(self, keys: set[tuple[int, str]], horizon: float) -> None:
        if not keys:
            return
        table = idempotency.c
        expired = select(table.sid, table.key).where(table.created_at <= horizon).limit(PURGE_LIMIT)
        past = {(sid, key) for sid, key in self._connection.execute(expired)}
        for some in lots(sorted(keys), KEYS_AT_ONCE):
            pairs = table.sid.in_({sid for sid, _ in some}), table.key.in_({key for _, key in some})
            for row in self._connection.execute(select(idempotency).where(*pairs)):
                if row.created_at > horizon:
                    self._keys[row.sid, row.key] = (row.digest, Appended(row.start, row.length))
                else:  # beyond the limit above; it must go, for its place is wanted
                    past.add((row.sid, row.key))
        if past:
            self._connection.execute(_DELETE_KEY, [{"of_sid": sid, "of_key": key} for sid, key in past])
        if not self._has_folded:
            for sid, key in keys:
                if (entry := self._journal.with_key(sid, key)) is not None:
                    self._keys[sid, key] = (entry.digest, Appended(entry.start, entry.end))

    def _flush(self) -> None:
        """Write what was gathered. Raises StoreError when a session's row is not what it was known to be."""
        if not self._gathered:
            return
        if any(tally.is_for_tables for tally in self._touched.values()):
            self._is_direct = True
            self._fold()
        if self._is_direct:
            self._write_rows()
        else:
            self._journaled = [Entry.of(write, answer.start, self._now) for write, answer in self._gathered]
            self._journal.write(self._connection, self._journaled)
        self._gathered.clear()
        self._touched.clear()

    def _write_rows(self) -> None:
        rows = Rows()
        for write, answer in self._gathered:
            rows.blocks.extend(_rows_of(write, answer.start))
            if write.payloads is not None:
                rows.add_payloads(write.sid, answer.start, write.payloads)
            if write.idempotency_key is not None:
                key = write.sid, write.idempotency_key
                rows.keys.append((*key, write.digest, answer.start, answer.length, self._now))
        evicting = {sid: tally for sid, tally in self._touched.items() if tally.evict_chunk is not None}
        rows.insert(self._connection)
        for sid, tally in evicting.items():
            assert tally.evict_chunk is not None
            tally.num_bytes -= evict(self._connection, sid, tally.first_position, tally.evict_chunk)
            tally.evict_chunk = None
        rows.lengths.extend(
            (tally.length, tally.num_bytes, self._now, tally.first_position, sid, tally.stored)
            for sid, tally in self._touched.items()
        )
        rows.update(self._connection)
        for tally in self._touched.values():
            tally.stored = tally.length


def _may_be_journaled(write: Write) -> bool:
    """Whether a write looks at no rows, is not too large, and has no value that a table would refuse later."""
    if not isinstance(write, Append):
        return isinstance(write, CreateSession)
    key = write.idempotency_key or ""
    if len(key) > MAX_KEY_CHARS or "\0" in key or not -(2**63) <= (write.episode or 0) < 2**63:
        return False
    num_bytes = len(write.data)
    if write.payloads is not None:
        num_bytes += sum(len(body) for body in write.payloads if body is not None)
    return num_bytes <= MAX_ENTRY_BYTES


def _rows_of(write: Append, start: int) -> Iterator[Values]:
    """An append as rows of the table, each of at most BLOCK_BYTES, or one token."""
    token_bytes = len(write.data) // write.num_tokens
    step = max(1, BLOCK_BYTES // max(1, token_bytes))
    for first in range(0, write.num_tokens, step):
        stop = min(first + step, write.num_tokens)
        is_whole = stop - first == write.num_tokens
        data = write.data if is_whole else write.data[first * token_bytes : stop * token_bytes]
        yield write.sid, start + first, stop - first, write.episode, zlib.crc32(data), data
