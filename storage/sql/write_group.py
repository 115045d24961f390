"""One group of writes on one connection, within its transaction: few statements however many writes.

The rows of appends are gathered and inserted together; any other write comes after what was gathered before it, so
that each write sees the ones before it.
Sessions and idempotency keys of all appends are looked up first. What the sessions' rows say is known from one group
to the next, because nobody else writes; each update compares it nevertheless.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from storage.base import (
    IDEMPOTENCY_SECONDS,
    AddPayloads,
    Append,
    Appended,
    Compact,
    CreateKey,
    CreateSession,
    DeleteKey,
    DeleteModel,
    DeleteSession,
    Fork,
    KeepSketches,
    KeyReused,
    NoSuchSession,
    Publish,
    PutModel,
    Refused,
    SessionExists,
    SessionFull,
    SessionRow,
    SetQuota,
    Truncate,
    UpdateSession,
    UseKey,
    Write,
    WriteResult,
    WrongLength,
    first_to_keep,
    wrong_cut,
)
from storage.sql.namespaces.keys import apply_to_key
from storage.sql.namespaces.models import apply_to_model
from storage.sql.namespaces.quotas import Usages
from storage.sql.prepared import Prepared, Values
from storage.sql.snapshot import row_of
from storage.sql.staging import add_payloads, publish
from storage.sql.tables import idempotency, sessions
from storage.sql.tokens.branches import delete_branch, fork, held_until, truncate
from storage.sql.tokens.compaction import compact, keep_sketches
from storage.sql.tokens.rows import BLOCK_BYTES, SIDS_AT_ONCE, Rows, portions
from storage.sql.tokens.spans import HAS_BRANCHED, OWN_LOG
from storage.sql.tokens.trimming import trim, trim_branch

PURGE_LIMIT = 500
"""Expired idempotency keys deleted with one group that brings new ones."""
KEYS_AT_ONCE = 32
"""Keys looked up by one statement. It probes the index once for each pair of a session and a key of them, which
is why it is few; a list of pairs reads better, but makes SQLite scan the whole table."""

MAX_TALLIES = 16_384
"""Sessions of which length and bytes are known from one group to the next."""

_DELETE_KEY = delete(idempotency).where(
    idempotency.c.sid == bindparam("of_sid"), idempotency.c.key == bindparam("of_key")
)
_TALLIES = select(
    *(sessions.c[name] for name in ("sid", "length", "num_bytes", "max_tokens", "first_position", "namespace")),
    OWN_LOG,
    HAS_BRANCHED,
).where(sessions.c.sid.in_(bindparam("sids", expanding=True)))
_EXPIRED = (
    select(idempotency.c.sid, idempotency.c.key)
    .where(idempotency.c.created_at <= bindparam("horizon"))
    .limit(PURGE_LIMIT)
)
_OF_KEYS = select(idempotency).where(
    idempotency.c.sid.in_(bindparam("sids", expanding=True)), idempotency.c.key.in_(bindparam("keys", expanding=True))
)
_OF_SID = select(sessions).where(sessions.c.sid == bindparam("of_sid"))
_CUT_COLUMNS = "length", "num_bytes", "updated_at", "first_position"
_CUT = Prepared(
    update(sessions)
    .where(sessions.c.sid == bindparam("of_sid"))
    .values({name: bindparam(name) for name in _CUT_COLUMNS}),
    *(*_CUT_COLUMNS, "of_sid"),
)


@dataclass(slots=True)
class Tally:
    """A session's length and bytes as its group leaves them, and `stored`, the length that its row has so far."""

    length: int
    num_bytes: int
    max_tokens: int | None
    first_position: int
    stored: int
    namespace: str
    log: int
    """To which it appends."""
    has_branched: bool = False
    """Whether others may share tokens of it."""
    trim_chunk: int | None = None
    """Set when `first_position` has moved and what lies before it is still there."""
    token_bytes: int = 0
    """Of one token, set with it."""


class WriteGroup:
    """See the head of this module. `run` once: decide what becomes of each append, then write.

    `tallies`, by sid, and `usages` are what the groups before have found out, and are kept up to date; they are wrong
    when this one's transaction is not committed.
    """

    def __init__(
        self, connection: Connection, writes: Sequence[Write], now: float, tallies: dict[int, Tally], usages: Usages
    ) -> None:
        self._connection = connection
        self._writes = writes
        self._now = now
        self._tallies = tallies
        self._usages = usages
        self._appends = [write for write in writes if isinstance(write, Append)]
        self._appending = {write.sid for write in self._appends}
        self._gathered: list[tuple[Append, Appended]] = []
        self._touched: dict[int, Tally] = {}
        """Those with tokens that were gathered."""
        self._keys: dict[tuple[int, str], tuple[bytes, Appended]] = {}
        self.has_deleted = False
        """Whether a session was deleted, truncated or trimmed."""

    def run(self) -> list[WriteResult]:
        """Decide what becomes of each write, and write it; one result for each."""
        self._learn()
        results: list[WriteResult] = []
        for write in self._writes:
            if isinstance(write, Append):
                results.append(self._decide(write))
            elif isinstance(write, CreateSession):
                results.append(self._create(write.row))
            elif isinstance(write, CreateKey | DeleteKey | UseKey):
                results.append(apply_to_key(self._connection, write))
            elif isinstance(write, PutModel | DeleteModel):
                results.append(apply_to_model(self._connection, write, self._usages))
            elif isinstance(write, SetQuota):
                self._write_appends()  # which what the namespace holds is counted with
                results.append(self._usages.set(self._connection, write.quota))
            else:
                self._write_appends()  # so that it sees those before it
                results.append(self._change(write))
        self._write_appends()
        return results

    # --- deciding ---

    def _learn(self) -> None:
        """What must be known of sessions and keys to decide on all appends."""
        horizon = self._now - IDEMPOTENCY_SECONDS
        keys = {(write.sid, write.idempotency_key) for write in self._appends if write.idempotency_key is not None}
        if len(self._tallies) > MAX_TALLIES:
            self._tallies.clear()
        self._look_up(self._appending.difference(self._tallies))
        self._look_up_keys(keys, horizon)

    def _decide(self, write: Append) -> Appended | Refused:
        """What becomes of an append; one that is not refused is gathered, and written later."""
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
            to_keep = first_to_keep(tally.length, write.num_tokens, tally.max_tokens, write.trim_chunk)
            if to_keep is None:
                return SessionFull(tally.length, tally.max_tokens)
            first_position = to_keep
        num_more = write.num_tokens - (first_position - tally.first_position)
        usage = self._usages.of(self._connection, tally.namespace)
        if usage is not None:
            num_bytes = len(write.data) // write.num_tokens * num_more
            if (refused := usage.beyond(0, num_more, num_bytes)) is not None:
                return refused
            usage.add(0, num_more, len(write.data))  # what a trim takes is known when it was made
        if first_position != tally.first_position:
            tally.first_position, tally.trim_chunk = first_position, write.trim_chunk
            tally.token_bytes = len(write.data) // write.num_tokens
        answer = Appended(tally.length, length, first_position=tally.first_position)
        self._gathered.append((write, answer))
        if key is not None:
            self._keys[key] = (write.digest, answer)
        tally.length = answer.length
        tally.num_bytes += len(write.data)
        self._touched[write.sid] = tally
        return answer

    def _look_up(self, sids: set[int]) -> None:
        for some in portions(sids, SIDS_AT_ONCE):
            for row in self._connection.execute(_TALLIES, {"sids": some}):
                held = row.length, row.num_bytes, row.max_tokens, row.first_position
                self._tallies[row.sid] = Tally(*held, row.length, row.namespace, row.log, row.has_branched)

    def _look_up_keys(self, keys: set[tuple[int, str]], horizon: float) -> None:
        if not keys:
            return
        past = {(sid, key) for sid, key in self._connection.execute(_EXPIRED, {"horizon": horizon})}
        for some in portions(sorted(keys), KEYS_AT_ONCE):
            of = {"sids": sorted({sid for sid, _ in some}), "keys": sorted({key for _, key in some})}
            for row in self._connection.execute(_OF_KEYS, of):
                if row.created_at > horizon:
                    self._keys[row.sid, row.key] = (row.digest, Appended(row.start, row.length))
                else:  # beyond the limit above; it must go, for its place is wanted
                    past.add((row.sid, row.key))
        if past:
            self._connection.execute(_DELETE_KEY, [{"of_sid": sid, "of_key": key} for sid, key in past])

    # --- writing ---

    def _change(
        self, write: UpdateSession | DeleteSession | Compact | KeepSketches | AddPayloads | Publish | Fork | Truncate
    ) -> WriteResult:
        """A write that looks at rows."""
        row = self._connection.execute(_OF_SID, {"of_sid": write.sid}).first()
        if row is None:
            return NoSuchSession(f"there is no session of key {write.sid}")
        if isinstance(write, UpdateSession):
            self._connection.execute(
                update(sessions)
                .where(sessions.c.sid == write.sid)
                .values(settings=dict(write.settings), model=write.settings.get("model"))
            )
            row = self._connection.execute(_OF_SID, {"of_sid": write.sid}).one()
        elif isinstance(write, Compact):
            if (refused := compact(self._connection, write)) is not None:
                return refused
        elif isinstance(write, KeepSketches):
            keep_sketches(self._connection, write)
        elif isinstance(write, AddPayloads):
            add_payloads(self._connection, write)
        elif isinstance(write, Publish):
            self._tallies.pop(write.sid, None)  # it has another namespace now, and another limit
            return publish(self._connection, write, row_of(row), self._usages)
        elif isinstance(write, Fork):
            return self._fork(write, row_of(row))
        elif isinstance(write, Truncate):
            return self._truncate(write, row_of(row))
        else:
            if (usage := self._usages.of(self._connection, row.namespace)) is not None:  # before it is gone
                usage.add(-1, row.first_position - row.length, -row.num_bytes)
            self._delete(write)
        return row_of(row)

    def _create(self, row: SessionRow) -> WriteResult:
        """A new session; what `row` says of its tokens is so."""
        of_key = sessions.c.namespace == row.namespace, sessions.c.id == row.id
        if self._connection.execute(select(sessions.c.sid).where(*of_key)).first() is not None:
            return SessionExists(f"there is a session {row.id!r}")
        length = max(row.length, row.first_position)  # a staged session begins where it is said to
        usage = self._usages.of(self._connection, row.namespace)
        if usage is not None:
            held = 1, length - row.first_position, row.num_bytes
            if (refused := usage.beyond(*held)) is not None:
                return refused
            usage.add(*held)
        values = {
            "namespace": row.namespace,
            "id": row.id,
            "settings": dict(row.settings),
            "model": row.settings.get("model"),
            "max_tokens": row.max_tokens,
            "length": length,
            "num_bytes": row.num_bytes,
            "first_position": row.first_position,
            "created_at": row.created_at,
            "updated_at": row.updated_at or row.created_at,
        }
        created = self._connection.execute(insert(sessions).values(values).returning(sessions)).one()
        counts = length, row.num_bytes, row.max_tokens, row.first_position
        self._tallies[created.sid] = Tally(*counts, length, row.namespace, created.sid)
        return row_of(created)

    def _fork(self, write: Fork, parent: SessionRow) -> WriteResult:
        length = parent.length if write.length is None else write.length
        if (refused := wrong_cut(parent, length)) is not None:
            return refused
        created = self._create(replace(write.row, **held_until(parent, length)))
        if isinstance(created, SessionRow):
            fork(self._connection, parent.sid, created.sid, length, write.chunk_size)
            for sid in (parent.sid, created.sid):
                if sid in self._tallies:
                    self._tallies[sid].has_branched = True
        return created

    def _truncate(self, write: Truncate, row: SessionRow) -> WriteResult:
        if (refused := wrong_cut(row, write.length or row.first_position, write.if_length)) is not None:
            return refused
        truncate(self._connection, row, write.length, write.chunk_size)
        values = {**held_until(row, write.length), "updated_at": self._now}
        _CUT.run(self._connection, [(*(values[name] for name in _CUT_COLUMNS), row.sid)])
        after = replace(row, **values)
        if (usage := self._usages.of(self._connection, row.namespace)) is not None:
            num_lost = row.length - row.first_position - (after.length - after.first_position)
            usage.add(0, -num_lost, after.num_bytes - row.num_bytes)
        self._tallies.pop(row.sid, None)
        if row.sid in self._appending:
            self._look_up({row.sid})
        lost = [key for key, (_, answer) in self._keys.items() if key[0] == row.sid and answer.length > write.length]
        for key in lost:
            del self._keys[key]
        self.has_deleted = True
        return after

    def _delete(self, write: DeleteSession) -> None:
        delete_branch(self._connection, write.sid)
        self.has_deleted = True
        self._tallies.pop(write.sid, None)

    def _write_appends(self) -> None:
        """Write what was gathered. Raises StoreError when a session's row is not what it was known to be."""
        if not self._gathered:
            return
        rows = Rows()
        for write, answer in self._gathered:
            log = self._touched[write.sid].log
            rows.blocks.extend(_rows_of(write, log, answer.start))
            if write.payloads is not None:
                rows.add_payloads(log, answer.start, write.payloads)
            if write.idempotency_key is not None:
                key = write.sid, write.idempotency_key
                rows.keys.append((*key, write.digest, answer.start, answer.length, self._now))
        trimming = {sid: tally for sid, tally in self._touched.items() if tally.trim_chunk is not None}
        branches: list[tuple[int, int]] = []
        rows.insert(self._connection)
        for sid, tally in trimming.items():
            assert tally.trim_chunk is not None
            if tally.has_branched:
                branches.append((sid, tally.trim_chunk))
                num_cut = tally.num_bytes - tally.token_bytes * (tally.length - tally.first_position)
            else:
                num_cut = trim(self._connection, tally.log, tally.first_position, tally.trim_chunk)
            tally.num_bytes -= num_cut
            if (usage := self._usages.of(self._connection, tally.namespace)) is not None:
                usage.add(0, 0, -num_cut)
            tally.trim_chunk = None
            self.has_deleted = True
        rows.lengths.extend(
            (tally.length, tally.num_bytes, self._now, tally.first_position, sid, tally.stored)
            for sid, tally in self._touched.items()
        )
        rows.update(self._connection)
        for sid, chunk_size in branches:
            trim_branch(self._connection, sid, chunk_size)
        for tally in self._touched.values():
            tally.stored = tally.length
        self._gathered.clear()
        self._touched.clear()


def _rows_of(write: Append, log: int, start: int) -> Iterator[Values]:
    """An append as rows of the table, each of at most BLOCK_BYTES, or one token."""
    token_bytes = len(write.data) // write.num_tokens
    step = max(1, BLOCK_BYTES // max(1, token_bytes))
    for first in range(0, write.num_tokens, step):
        stop = min(first + step, write.num_tokens)
        is_whole = stop - first == write.num_tokens
        data = write.data if is_whole else write.data[first * token_bytes : stop * token_bytes]
        yield log, start + first, stop - first, write.episode, zlib.crc32(data), data
