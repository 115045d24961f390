"""The rows of deleted sessions, deleted a few at a time, so that no other write waits long.

A deleted session is gone at once: its row is. What does not go with it in the same transaction is found again
through `deleted_sessions`, by whatever server comes next. Runs within a transaction. Does not know what rows say.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from storage.sql.tables import blocks, deleted_sessions, idempotency, payloads, summaries

ROWS_AT_ONCE = {
    blocks.c.start: 64,  # of at most rows.BLOCK_BYTES each, or one token: 4 MiB
    summaries.c.first: 32,
    payloads.c.position: 512,
    idempotency.c.key: 512,
}
"""Per table, by the column that is its key within a session: how many rows one step deletes."""


def leave(connection: Connection, sid: int) -> None:
    """Begin to purge a session whose row is gone; what is left is remembered."""
    if _purge(connection, sid):
        connection.execute(insert(deleted_sessions).values(sid=sid))


def purge_more(connection: Connection, sid: int | None) -> bool | None:
    """One step more, of this session or of any; whether there is more to do, None when there was nothing."""
    waiting = select(deleted_sessions.c.sid).order_by(deleted_sessions.c.sid).limit(2)
    sids = connection.execute(waiting if sid is None else waiting.where(deleted_sessions.c.sid == sid)).scalars().all()
    if not sids:
        return None
    if _purge(connection, sids[0]):
        return True
    connection.execute(delete(deleted_sessions).where(deleted_sessions.c.sid == sids[0]))
    return len(sids) > 1


def _purge(connection: Connection, sid: int) -> bool:
    is_left = False
    for key, num_rows in ROWS_AT_ONCE.items():
        of_session = key.table.c.sid == sid
        some = select(key).where(of_session).order_by(key).limit(num_rows)
        is_left |= connection.execute(delete(key.table).where(of_session, key.in_(some))).rowcount == num_rows
    return is_left
