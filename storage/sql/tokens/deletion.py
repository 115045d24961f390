"""What deleted, truncated and trimmed sessions left in their logs, removed a few rows at a time, so that no other write
waits long.

A deleted session is gone at once: its row is. What does not go with it in the same transaction is found again
through `leftovers`, by whatever server comes next. Runs within a transaction. Does not know what rows say.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select

from storage.sql.tables import idempotency, leftovers, sessions
from storage.sql.tokens.removal import remove
from storage.sql.tokens.spans import needs_of

KEYS_AT_ONCE = 512
"""Idempotency keys that one step deletes."""


def leave(connection: Connection, sid: int, logs: Iterable[int], chunk_size: int | None) -> None:
    """Begin to purge what a session does not need any more of logs; what is left is remembered."""
    for log in sorted(logs):
        if _purge(connection, log, chunk_size):
            connection.execute(delete(leftovers).where(leftovers.c.log == log, leftovers.c.sid == sid))
            connection.execute(insert(leftovers).values(log=log, sid=sid, chunk_size=chunk_size))


def purge_more(connection: Connection, sid: int | None) -> bool | None:
    """One step more, of what this session left or any; whether there is more to do, None when there was nothing."""
    waiting = select(leftovers).order_by(leftovers.c.log).limit(2)
    rows = connection.execute(waiting if sid is None else waiting.where(leftovers.c.sid == sid)).all()
    if not rows:
        return None
    log, of_sid, chunk_size = rows[0]
    if _purge(connection, log, chunk_size):
        return True
    connection.execute(delete(leftovers).where(leftovers.c.log == log, leftovers.c.sid == of_sid))
    return len(rows) > 1


def _purge(connection: Connection, log: int, chunk_size: int | None) -> bool:
    """A step through what nobody needs of a log, and of the keys of the session of its number, if that is gone."""
    keys = idempotency.c.sid == log, idempotency.c.sid.not_in(select(sessions.c.sid).where(sessions.c.sid == log))
    some = select(idempotency.c.key).where(*keys).order_by(idempotency.c.key).limit(KEYS_AT_ONCE)
    deleted = connection.execute(delete(idempotency).where(*keys, idempotency.c.key.in_(some)))
    is_left = deleted.rowcount == KEYS_AT_ONCE
    needs, end = needs_of(connection, log), 0
    gaps: list[tuple[int, int | None]] = []
    for start, stop in needs.ranges:
        gaps += [(end, start)] if end < start else []
        end = stop if stop is not None else -1
    gaps += [(end, None)] if end >= 0 else []
    for first, last in gaps:
        is_left |= remove(connection, log, first, last, needs.chunk_size or chunk_size, in_steps=True)[1]
    return is_left
