"""Sessions that are written before they are there, under a name that nobody asks for, until all is known to be right.

What a process that ended has left of them is deleted as any other session is, by the next one. Runs within a write's
transaction. Does not know why they wait.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from storage.base import AddPayloads, Publish, SessionExists, SessionRow, WriteResult
from storage.sql.namespaces.quotas import Usages
from storage.sql.snapshot import row_of
from storage.sql.tables import sessions
from storage.sql.tokens.rows import Rows


def add_payloads(connection: Connection, write: AddPayloads) -> None:
    """Insert them."""
    rows = Rows()
    rows.add_payloads(write.sid, write.start, write.payloads)
    rows.insert(connection)


def publish(connection: Connection, write: Publish, staged: SessionRow, usages: Usages) -> WriteResult:
    """Give a staged session its name, and count it."""
    row = write.row
    of_key = sessions.c.namespace == row.namespace, sessions.c.id == row.id
    if connection.execute(select(sessions.c.sid).where(*of_key)).first() is not None:
        return SessionExists(f"there is a session {row.id!r}")
    held = 1, staged.length - staged.first_position, staged.num_bytes
    if (usage := usages.of(connection, row.namespace)) is not None:
        if (refused := usage.beyond(*held)) is not None:
            return refused
        usage.add(*held)
    values = {
        "namespace": row.namespace,
        "id": row.id,
        "settings": dict(row.settings),
        "model": row.settings.get("model"),
        "max_tokens": row.max_tokens,
        "created_at": row.created_at,
        "updated_at": row.updated_at or row.created_at,
    }
    of_sid = sessions.c.sid == write.sid
    connection.execute(update(sessions).where(of_sid).values(values))
    return row_of(connection.execute(select(sessions).where(of_sid)).one())
