"""One group of writes on one connection, within its transaction: few statements however many writes.

Sessions and idempotency keys of all appends are looked up first, rows are gathered and inserted together.
Any other write flushes what was gathered before it, so that each write sees the ones before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

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
    SessionExists,
    SessionFull,
    SessionRow,
    UpdateSession,
    Write,
    WrongLength,
)
from storage.tables import blocks, idempotency, payloads, sessions

T = TypeVar("T")

BLOCK_BYTES = 256 << 10
"""A longer append is stored as several blocks: bounds what a reader must hold, and what a small read costs."""
PURGE_LIMIT = 500
"""Expired idempotency keys deleted with one group that brings new ones."""
SIDS_AT_ONCE = 500
"""Sessions looked up by one statement: databases bound the number of parameters."""
KEYS_AT_ONCE = 32
"""Keys looked up by one statement. It probes the index once for each pair of a session and a key of them, which
is why it is few; a list of pairs reads better, but makes SQLite scan the whole table."""

_UPDATE_LENGTH = (
    update(sessions)
    .where(sessions.c.sid == bindparam("of_sid"))
    .values(length=bindparam("to_length"), num_bytes=bindparam("to_num_bytes"), updated_at=bindparam("at"))
)


def row_of(row: Row[Any]) -> SessionRow:
    """A row of the table as the contract's record."""
    return SessionRow(
        id=row.id,
        settings=row.settings,
        created_at=row.created_at,
        max_tokens=row.max_tokens,
        sid=row.sid,
        length=row.length,
        num_bytes=row.num_bytes,
        updated_at=row.updated_at,
    )


@dataclass(slots=True)
class _Tally:
    """A session's length and bytes as this group leaves them."""

    length: int
    num_bytes: int
    max_tokens: int | None
    is_changed: bool = False


_DELETE_KEY = delete(idempotency).where(
    idempotency.c.sid == bindparam("of_sid"), idempotency.c.key == bindparam("of_key")
)


class WriteGroup:
    """See the head of this module. `run` once."""

    def __init__(self, connection: Connection, writes: Sequence[Write], now: float) -> None:
        self.has_deleted = False
        self._connection = connection
        self._writes = writes
        self._now = now
        self._tallies: dict[int, _Tally] = {}
        self._keys: dict[tuple[int, str], tuple[bytes, Appended]] = {}
        self._blocks: list[dict[str, Any]] = []
        self._payloads: list[dict[str, Any]] = []
        self._new_keys: list[dict[str, Any]] = []

    def run(self) -> list[Outcome]:
        """Do all writes; one outcome for each."""
        appends = [write for write in self._writes if isinstance(write, Append)]
        self._look_up({write.sid for write in appends})
        self._look_up_keys({(w.sid, w.idempotency_key) for w in appends if w.idempotency_key is not None})
        outcomes = [self._apply(write) for write in self._writes]
        self._flush()
        return outcomes

    def _apply(self, write: Write) -> Outcome:
        if isinstance(write, Append):
            return self._append(write)
        self._flush()
        if isinstance(write, CreateSession):
            return self._create(write.row)
        row = self._connection.execute(select(sessions).where(sessions.c.sid == write.sid)).first()
        if row is None:
            return NoSuchSession(f"there is no session of key {write.sid}")
        if isinstance(write, UpdateSession):
            self._connection.execute(
                update(sessions).where(sessions.c.sid == write.sid).values(settings=dict(write.settings))
            )
            row = self._connection.execute(select(sessions).where(sessions.c.sid == write.sid)).one()
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
        self._tallies[created.sid] = _Tally(0, 0, created.max_tokens)
        return row_of(created)

    def _delete(self, write: DeleteSession) -> None:
        for table in (blocks, payloads, idempotency, sessions):
            self._connection.execute(delete(table).where(table.c.sid == write.sid))
        self._tallies.pop(write.sid, None)
        self.has_deleted = True

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
        answer = Appended(tally.length, tally.length + write.num_tokens)
        if tally.max_tokens is not None and answer.length > tally.max_tokens:
            return SessionFull(tally.length, tally.max_tokens)
        self._blocks.extend(_rows_of(write, answer.start))
        if write.payloads is not None:
            self._payloads.extend(
                {"sid": write.sid, "position": answer.start + place, "body": body}
                for place, body in enumerate(write.payloads)
                if body is not None
            )
        if key is not None:
            self._keys[key] = (write.digest, answer)
            self._new_keys.append(
                {
                    "sid": key[0],
                    "key": key[1],
                    "digest": write.digest,
                    "start": answer.start,
                    "length": answer.length,
                    "created_at": self._now,
                }
            )
        tally.length = answer.length
        tally.num_bytes += len(write.data)
        tally.is_changed = True
        return answer

    def _look_up(self, sids: set[int]) -> None:
        columns = (sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.max_tokens)
        for some in _lots(sids, SIDS_AT_ONCE):
            rows = self._connection.execute(select(*columns).where(sessions.c.sid.in_(some)))
            for sid, length, num_bytes, max_tokens in rows:
                self._tallies[sid] = _Tally(length, num_bytes, max_tokens)

    def _look_up_keys(self, keys: set[tuple[int, str]]) -> None:
        if not keys:
            return
        table, horizon = idempotency.c, self._now - IDEMPOTENCY_SECONDS
        expired = select(table.sid, table.key).where(table.created_at <= horizon).limit(PURGE_LIMIT)
        past = {(sid, key) for sid, key in self._connection.execute(expired)}
        for some in _lots(sorted(keys), KEYS_AT_ONCE):
            pairs = table.sid.in_({sid for sid, _ in some}), table.key.in_({key for _, key in some})
            for row in self._connection.execute(select(idempotency).where(*pairs)):
                if row.created_at > horizon:
                    self._keys[row.sid, row.key] = (row.digest, Appended(row.start, row.length))
                else:  # beyond the limit above; it must go, for its place is wanted
                    past.add((row.sid, row.key))
        if past:
            self._connection.execute(_DELETE_KEY, [{"of_sid": sid, "of_key": key} for sid, key in past])

    def _flush(self) -> None:
        """Write what was gathered."""
        for table, rows in ((blocks, self._blocks), (payloads, self._payloads), (idempotency, self._new_keys)):
            if rows:
                self._connection.execute(insert(table), rows)
                rows.clear()
        changed = [
            {"of_sid": sid, "to_length": tally.length, "to_num_bytes": tally.num_bytes, "at": self._now}
            for sid, tally in self._tallies.items()
            if tally.is_changed
        ]
        if changed:
            self._connection.execute(_UPDATE_LENGTH, changed)
            for tally in self._tallies.values():
                tally.is_changed = False


def _rows_of(write: Append, start: int) -> Iterator[dict[str, Any]]:
    """An append as rows of the table, each of at most BLOCK_BYTES, or one token."""
    token_bytes = len(write.data) // write.num_tokens
    step = max(1, BLOCK_BYTES // max(1, token_bytes))
    for first in range(0, write.num_tokens, step):
        stop = min(first + step, write.num_tokens)
        is_whole = stop - first == write.num_tokens
        data = write.data if is_whole else write.data[first * token_bytes : stop * token_bytes]
        yield {
            "sid": write.sid,
            "start": start + first,
            "num_tokens": stop - first,
            "episode": write.episode,
            "checksum": zlib.crc32(data),
            "data": data,
        }


def _lots(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
