"""Small appends at rest: a row per group of writes, until many of them are folded into the tables together.

An append of one token has a place of its own in the index of every table: 32 of them change 32 pages, and each page
is written whole. Here they are one row, and when MAX_BYTES are there, what each session got since becomes few blocks.
Whoever writes keeps the same entries in memory (`Journal`), so that nobody has to read them back; a store that is
opened folds what the last one left. What a session holds is what the tables have up to its row's length, and
the entries from there on (`beyond`): so a reader that looks at the entries first and at the tables then sees
every token once, whatever is folded between the two.
Does not know what tokens say, nor who may write.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import orjson
from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select

from storage.base import Append, SessionRow, StoreError, StoreFenced
from storage.sql.compaction import joined
from storage.sql.prepared import Prepared
from storage.sql.rows import SIDS_AT_ONCE, Rows, lots
from storage.sql.tables import journal, sessions

MAX_ENTRY_BYTES = 16 << 10
"""Larger appends, payloads included, go into the tables at once: they would only be written twice."""
MAX_BYTES = 4 << 20
"""What the journal holds, about, when it is folded."""
ENTRY_BYTES = 1 << 10
PAYLOAD_BYTES = 1 << 8
"""What an entry, and each of its payloads, counts beside its bytes, so that folding many small ones takes no longer."""

_INSERT = Prepared(insert(journal), "seq", "at", "checksum", "entries", "entries_again", "data")


class Entry(NamedTuple):
    """One append: the tokens start .. start+num_tokens-1 of a session."""

    sid: int
    start: int
    num_tokens: int
    episode: int | None
    checksum: int
    data: bytes
    payloads: Sequence[bytes | None] | None
    key: str | None
    digest: bytes
    at: float
    """Seconds since the epoch."""

    @property
    def end(self) -> int:
        """The session's length after it."""
        return self.start + self.num_tokens

    @property
    def weight_bytes(self) -> int:
        """What it counts of MAX_BYTES."""
        num_bytes = ENTRY_BYTES + len(self.data)
        if self.payloads is not None:
            num_bytes += sum(PAYLOAD_BYTES + len(body) for body in self.payloads if body is not None)
        return num_bytes

    @classmethod
    def of(cls, write: Append, start: int, now: float) -> Entry:
        """An append that begins at position `start`."""
        return cls(
            *(write.sid, start, write.num_tokens, write.episode, zlib.crc32(write.data), write.data),
            *(write.payloads, write.idempotency_key, write.digest, now),
        )


Entries = Mapping[int, Sequence[Entry]]
"""By sid, in the order of their positions."""


class Journal:
    """The entries that were written and not folded yet. One thread changes them, any may look.

    `first_seq` is the first row that is the owner's: what stands before was damaged when the store was opened.
    """

    def __init__(self, first_seq: int = 0) -> None:
        self.num_bytes = 0
        self._first_seq = self._next_seq = first_seq
        self._entries: dict[int, list[Entry]] = {}
        self._keys: dict[tuple[int, str], Entry] = {}
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        """Whether it is to be folded."""
        return self.num_bytes >= MAX_BYTES

    def of(self, *sids: int) -> Entries:
        """The entries of these sessions, as of one moment."""
        with self._lock:
            return {sid: tuple(found) for sid in sids if (found := self._entries.get(sid))}

    def all(self) -> Entries:
        """Those of all sessions."""
        return self.of(*list(self._entries))

    def with_key(self, sid: int, key: str) -> Entry | None:
        """The entry of this idempotency key."""
        return self._keys.get((sid, key))

    def write(self, connection: Connection, entries: Sequence[Entry]) -> None:
        """Insert a group's row; `add` when it is committed. Raises StoreError for what cannot be stored."""
        index, data = _encoded(entries)
        _INSERT.run(connection, [(self._next_seq, entries[0].at, zlib.crc32(index), index, index, data)])

    def add(self, entries: Sequence[Entry]) -> None:
        """Count a group that is committed."""
        with self._lock:
            for entry in entries:
                self._entries.setdefault(entry.sid, []).append(entry)
                if entry.key is not None:
                    self._keys[entry.sid, entry.key] = entry
                self.num_bytes += entry.weight_bytes
        self._next_seq += 1

    def fold(self, connection: Connection) -> None:
        """Put everything into the tables; `clear` when it is committed. Raises StoreFenced where they do not fit:
        the next start takes what does."""
        if self._entries:
            _fold(connection, self._entries, journal.c.seq >= self._first_seq, is_strict=True)

    def clear(self) -> None:
        """Forget what was folded."""
        with self._lock:
            self._entries = {}
            self._keys = {}
            self.num_bytes = 0


def recover(connection: Connection) -> Journal:
    """Fold what another owner left; the empty journal to go on with. A row that cannot be read stays, and is logged."""
    entries, damaged = read(connection)
    for message in damaged.values():
        logging.getLogger(__name__).error("%s", message)
    _fold(connection, entries, journal.c.seq.not_in(damaged), is_strict=False)
    return Journal(1 + max(damaged, default=0))


def read(connection: Connection) -> tuple[dict[int, list[Entry]], dict[int, str]]:
    """What the rows hold, for who did not write them; and what is wrong with rows that cannot be read, by number."""
    entries: dict[int, list[Entry]] = {}
    damaged: dict[int, str] = {}
    for row in connection.execute(select(journal).order_by(journal.c.seq)):
        try:
            for entry in _decoded(row):
                entries.setdefault(entry.sid, []).append(entry)
        except ValueError as error:
            damaged[row.seq] = f"row {row.seq} of the journal cannot be read, {error}: its appends are lost"
    return entries, damaged


def delete_row(connection: Connection, seq: int) -> None:
    """Give up a row that cannot be read."""
    connection.execute(delete(journal).where(journal.c.seq == seq))


def beyond(connection: Connection, sid: int, entries: Entries) -> Sequence[Entry]:
    """The entries of a session that this connection's tables do not have; none of a session that is not there."""
    if (found := entries.get(sid)) is None:
        return ()
    length = connection.execute(select(sessions.c.length).where(sessions.c.sid == sid)).scalar()
    return () if length is None else _from(length, found)


def all_beyond(connection: Connection, entries: Entries) -> Entries:
    """The same of all sessions that have entries, in few statements."""
    found: dict[int, Sequence[Entry]] = {}
    for some in lots(entries, SIDS_AT_ONCE):
        query = select(sessions.c.sid, sessions.c.length).where(sessions.c.sid.in_(some))
        found.update((sid, _from(length, entries[sid])) for sid, length in connection.execute(query))
    return found


def counted(row: SessionRow, entries: Entries) -> SessionRow:
    """A session's row as it is with the entries that are not in it."""
    new = _from(row.length, entries.get(row.sid, ()))
    if not new:
        return row
    num_bytes = row.num_bytes + sum(len(entry.data) for entry in new)
    return replace(row, length=new[-1].end, num_bytes=num_bytes, updated_at=new[-1].at)


def _from(length: int, entries: Sequence[Entry]) -> Sequence[Entry]:
    if not entries or entries[0].start >= length:
        return entries
    return [entry for entry in entries if entry.start >= length]


def _fold(connection: Connection, entries: Entries, which: ColumnElement[bool], *, is_strict: bool) -> None:
    """Put entries into the tables, but not those that are there already, nor those of sessions that are gone.

    With `is_strict` there must be none of these, and the entries are this process's own.
    """
    connection.execute(delete(journal).where(which))  # first: what is inserted takes the pages that this frees
    rows = Rows()
    num_sessions = 0
    columns = (sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.first_position)
    for some in lots(entries, SIDS_AT_ONCE):
        for sid, length, num_bytes, first in connection.execute(select(*columns).where(sessions.c.sid.in_(some))):
            new = _from(length, entries[sid])
            num_sessions += len(new) == len(entries[sid])
            if not new:
                continue
            rows.blocks.extend(joined(new, are_known=is_strict))
            total = num_bytes + sum(len(entry.data) for entry in new)
            rows.lengths.append((new[-1].end, total, new[-1].at, first, sid, length))
            for entry in new:
                if entry.payloads is not None:
                    rows.add_payloads(sid, entry.start, entry.payloads)
                if entry.key is not None:
                    rows.keys.append((sid, entry.key, entry.digest, entry.start, entry.end, entry.at))
    if is_strict and num_sessions != len(entries):
        raise StoreFenced("a session was changed by something else than its owner; its last appends do not fit")
    rows.insert(connection)
    rows.update(connection)


def _encoded(entries: Sequence[Entry]) -> tuple[bytes, bytes]:
    """A row's index and its data: of each entry the tokens, then the payloads."""
    index: list[Any] = []
    parts: list[bytes] = []
    for entry in entries:
        parts.append(entry.data)
        sizes = None
        if entry.payloads is not None:
            parts.extend(body for body in entry.payloads if body is not None)
            sizes = [None if body is None else len(body) for body in entry.payloads]
        numbers = (entry.sid, entry.start, entry.num_tokens, entry.episode, entry.checksum, len(entry.data))
        index.append((*numbers, sizes, entry.key, entry.digest.hex()))
    try:
        return orjson.dumps(index), b"".join(parts)
    except orjson.JSONEncodeError as error:  # a number or a text that no database could take either
        raise StoreError(f"a value cannot be stored: {error}") from error


def _decoded(row: Row[Any]) -> list[Entry]:
    """A row's entries. Raises ValueError, as part of a sentence, for one that is damaged."""
    index = next((some for some in (row.entries, row.entries_again) if zlib.crc32(some) == row.checksum), None)
    if index is None:
        raise ValueError("its index does not match its checksum")
    found: list[Entry] = []
    data, at = row.data, 0
    for sid, start, num_tokens, episode, checksum, num_bytes, sizes, key, digest in orjson.loads(index):
        tokens, at = data[at : at + num_bytes], at + num_bytes
        payloads: list[bytes | None] | None = None if sizes is None else []
        for size in sizes or ():
            assert payloads is not None
            payloads.append(None if size is None else data[at : at + size])
            at += size or 0
        found.append(
            Entry(sid, start, num_tokens, episode, checksum, tokens, payloads, key, bytes.fromhex(digest), row.at)
        )
    if at != len(data):
        raise ValueError(f"its data has {len(data)} bytes, {at} were expected")
    return found
