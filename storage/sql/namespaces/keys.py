"""Callers' keys in the database. Runs within a write's transaction. Does not know roles, nor any secret."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, delete, insert, select, update

from storage.base import CreateKey, DeleteKey, KeyExists, KeyRow, KeyWrite, NoSuchKey, Refused
from storage.sql.tables import keys


def apply_to_key(connection: Connection, write: KeyWrite) -> KeyRow | Refused:
    """Make, delete or note the use of a key; the row as it is now, or was, or why not."""
    namespace, name = (
        (write.row.namespace, write.row.name) if isinstance(write, CreateKey) else (write.namespace, write.name)
    )
    of_key = keys.c.namespace == namespace, keys.c.name == name
    row = connection.execute(select(keys).where(*of_key)).mappings().first()
    if isinstance(write, CreateKey):
        if row is not None:
            return KeyExists(f"there is a key {name!r}")
        connection.execute(insert(keys).values(asdict(write.row)))
        return write.row
    if row is None:
        return NoSuchKey(f"there is no key {name!r}")
    if isinstance(write, DeleteKey):
        connection.execute(delete(keys).where(*of_key))
        return KeyRow(**row)
    connection.execute(update(keys).where(*of_key).values(last_used_at=write.at))
    return KeyRow(**{**row, "last_used_at": write.at})
