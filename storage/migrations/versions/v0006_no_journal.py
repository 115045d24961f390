"""The journal goes: what is left in it is put into the other tables, an append a block."""

import json
import logging
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


class Entry(NamedTuple):
    """One append as the journal had it."""

    sid: int
    start: int
    num_tokens: int
    episode: int | None
    checksum: int
    data: bytes
    payloads: list[bytes | None] | None
    key: str | None
    digest: bytes
    at: float


def upgrade() -> None:
    connection = op.get_bind()
    journal = sa.table("journal", *map(sa.column, ("seq", "at", "checksum", "entries", "entries_again", "data")))
    for row in connection.execute(sa.select(journal).order_by(journal.c.seq)).all():
        try:
            entries = list(entries_of(row))
        except ValueError as error:
            logging.getLogger(__name__).error(
                "row %d of the journal cannot be read, %s: its appends are lost", row.seq, error
            )
            continue
        for entry in entries:
            put(connection, entry)
    op.drop_table("journal")


def entries_of(row: Any) -> Iterator[Entry]:
    """Raises ValueError, as part of a sentence, for a row that is damaged."""
    index = next((some for some in (row.entries, row.entries_again) if zlib.crc32(some) == row.checksum), None)
    if index is None:
        raise ValueError("its index does not match its checksum")
    at, data = 0, row.data
    found = json.loads(index)
    if sum(entry[5] + sum(size or 0 for size in entry[6] or ()) for entry in found) != len(data):
        raise ValueError(f"its data has {len(data)} bytes, which is not what its index says")
    for sid, start, num_tokens, episode, checksum, num_bytes, sizes, key, digest in found:
        tokens, at = data[at : at + num_bytes], at + num_bytes
        payloads: list[bytes | None] | None = None if sizes is None else []
        for size in sizes or ():
            assert payloads is not None
            payloads.append(None if size is None else data[at : at + size])
            at += size or 0
        yield Entry(sid, start, num_tokens, episode, checksum, tokens, payloads, key, bytes.fromhex(digest), row.at)


def put(connection: sa.Connection, entry: Entry) -> None:
    """An append into the tables, unless it is there already, or its session is gone."""
    sessions = sa.table("sessions", *map(sa.column, ("sid", "length", "num_bytes", "updated_at")))
    of_session = sessions.c.sid == entry.sid
    row = connection.execute(sa.select(sessions.c.length, sessions.c.num_bytes).where(of_session)).first()
    if row is None or entry.start < row.length:
        return
    values = {"sid": entry.sid, "start": entry.start, "num_tokens": entry.num_tokens, "episode": entry.episode}
    insert(connection, "blocks", [{**values, "checksum": entry.checksum, "data": entry.data}])
    bodies = enumerate(entry.payloads or (), entry.start)
    insert(connection, "payloads", [{"sid": entry.sid, "position": at, "body": body} for at, body in bodies if body])
    end = entry.start + entry.num_tokens
    if entry.key is not None:
        used = {"sid": entry.sid, "key": entry.key, "digest": entry.digest, "start": entry.start, "length": end}
        insert(connection, "idempotency", [{**used, "created_at": entry.at}])
    changed = {"length": end, "num_bytes": row.num_bytes + len(entry.data), "updated_at": entry.at}
    connection.execute(sa.update(sessions).where(of_session).values(**changed))


def insert(connection: sa.Connection, name: str, rows: list[dict[str, Any]]) -> None:
    """Rows into a table."""
    if rows:
        connection.execute(sa.insert(sa.table(name, *map(sa.column, rows[0]))), rows)
