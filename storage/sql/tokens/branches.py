"""Sessions that share tokens: forking one, truncating and deleting one that others may share.

A fork is a few rows, however long the session is. What a session lets go of that others have stays for them; the rest
is deleted at once where it is little, else in steps. Runs within a write's transaction. Does not know what tokens say.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, delete

from storage.base import SessionRow
from storage.sql.prepared import Prepared
from storage.sql.tables import idempotency, sessions, spans
from storage.sql.tokens.deletion import leave
from storage.sql.tokens.removal import remove
from storage.sql.tokens.spans import Span, cut, lay, layout_of, new_log, shared_until

TOKENS_AT_ONCE = 4_096
BYTES_AT_ONCE = 4 << 20
"""A truncation that forgets no more than this deletes it in its own transaction."""
_DELETE_KEYS = Prepared(
    delete(idempotency).where(
        idempotency.c.sid == bindparam("of_sid"), idempotency.c.length > bindparam("beyond_length")
    ),
    *("of_sid", "beyond_length"),
)


def held_until(row: SessionRow, length: int) -> dict[str, Any]:
    """What the row of a session says that holds this one's tokens before position `length`."""
    first, num_held = min(row.first_position, length), row.length - row.first_position
    token_bytes = row.num_bytes // num_held if num_held else 0
    return {"length": length, "first_position": first, "num_bytes": (length - first) * token_bytes}


def fork(connection: Connection, parent: int, child: int, length: int, chunk_size: int) -> None:
    """Let `child`, whose row is there, have the parent's tokens before position `length`."""
    layout = layout_of(connection, parent)
    assert layout is not None, "it was looked up"
    shared = cut(layout.spans, layout.first_position, length)
    lay(connection, child, layout._replace(shared=shared, log=child, own_start=length, chunk_size=chunk_size))


def truncate(connection: Connection, row: SessionRow, length: int, chunk_size: int) -> None:
    """Take the tokens from position `length` on from a session, whose row is as it was before."""
    layout = layout_of(connection, row.sid)
    assert layout is not None, "it was looked up"
    _DELETE_KEYS.run(connection, [(row.sid, length)])
    begin = max(layout.own_start, layout.first_position)
    log, from_, shared = layout.log, max(length, begin), cut(layout.shared, 0, length)
    num_bytes = row.num_bytes - held_until(row, from_)["num_bytes"]
    is_small = row.length - from_ <= TOKENS_AT_ONCE and num_bytes <= BYTES_AT_ONCE
    if shared_until(connection, log, row.sid) <= from_ and is_small:
        remove(connection, log, from_, None, chunk_size)
    else:
        shared += [Span(log, begin, length)] if begin < length else []
        log = new_log(connection)
    after = layout._replace(shared=shared, log=log, own_start=min(length, layout.own_start), chunk_size=chunk_size)
    if log != layout.log:
        after = after._replace(own_start=length)
    if (after.shared, after.log, after.own_start) != (layout.shared, layout.log, layout.own_start):
        lay(connection, row.sid, after)
    leave(connection, row.sid, layout.logs - {log}, chunk_size)


def delete_branch(connection: Connection, sid: int) -> None:
    """Delete a session's row, and what of its logs nobody else has."""
    layout = layout_of(connection, sid)
    assert layout is not None, "it was looked up"
    connection.execute(delete(sessions).where(sessions.c.sid == sid))
    connection.execute(delete(spans).where(spans.c.sid == sid))
    leave(connection, sid, layout.logs | {sid}, layout.chunk_size)
