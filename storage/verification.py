"""Reading a whole database and comparing it with what the contract promises. Changes nothing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from sqlalchemy import Connection, func, or_, select
from sqlalchemy.exc import DatabaseError

from storage.base import Problem
from storage.group import row_of
from storage.tables import blocks, idempotency, payloads, sessions

MAX_STRUCTURE_PROBLEMS = 20


def problems(connection: Connection) -> Iterator[Problem]:
    """What is wrong: the file's structure, each session's blocks and payloads, rows of no session."""
    try:
        for (message,) in connection.exec_driver_sql(f"PRAGMA quick_check({MAX_STRUCTURE_PROBLEMS})").all():
            if message != "ok":
                yield Problem(None, f"the database file is damaged: {message}")
        for row in connection.execute(select(sessions).order_by(sessions.c.id)).all():
            session = row_of(row)
            yield from _of_blocks(connection, session.id, session.sid, session.length, session.num_bytes)
            outside = or_(payloads.c.position < 0, payloads.c.position >= session.length)
            found = select(func.count()).select_from(payloads).where(payloads.c.sid == session.sid, outside)
            if count := connection.execute(found).scalar_one():
                yield Problem(session.id, f"{count} payloads lie outside its {session.length} tokens")
        for table in (blocks, payloads, idempotency):
            orphans = select(func.count()).select_from(table).where(table.c.sid.not_in(select(sessions.c.sid)))
            if count := connection.execute(orphans).scalar_one():
                yield Problem(None, f"{count} rows of table {table.name} belong to no session")
    except DatabaseError as error:
        yield Problem(None, f"the database file is damaged: {error.orig}")


def _of_blocks(connection: Connection, session_id: str, sid: int, length: int, num_bytes: int) -> Iterator[Problem]:
    expected, total = 0, 0
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == sid).order_by(blocks.c.start)
    for start, num_tokens, checksum, data in connection.execution_options(yield_per=64).execute(query):
        if start != expected:
            yield Problem(session_id, f"a block begins at position {start}, {expected} was expected")
        if zlib.crc32(data) != checksum:
            yield Problem(session_id, f"the block at position {start} does not match its checksum")
        expected = start + num_tokens
        total += len(data)
    if expected != length:
        yield Problem(session_id, f"its blocks end at position {expected}, its length is {length}")
    if total != num_bytes:
        yield Problem(session_id, f"its blocks hold {total} bytes, {num_bytes} are recorded")
