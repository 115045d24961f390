"""Reading a whole database and comparing it with what the contract promises. Changes nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator

from sqlalchemy import Connection, String, func, or_, select, type_coerce
from sqlalchemy.exc import DatabaseError

from storage.base import Problem
from storage.tables import blocks, idempotency, payloads, sessions

MAX_STRUCTURE_PROBLEMS = 20


def problems(connection: Connection) -> Iterator[Problem]:
    """What is wrong: the file's structure, each session's blocks and payloads, rows of no session."""
    try:
        for (message,) in connection.exec_driver_sql(f"PRAGMA quick_check({MAX_STRUCTURE_PROBLEMS})").all():
            if message != "ok":
                yield Problem(None, f"the database file is damaged: {message}")
        columns = (sessions.c.id, sessions.c.sid, sessions.c.length, sessions.c.num_bytes)
        settings = type_coerce(sessions.c.settings, String).label("settings")
        for row in connection.execute(select(*columns, settings).order_by(sessions.c.id)).all():
            if not _is_object(row.settings):
                yield Problem(row.id, "its settings are no JSON object")
            yield from _of_blocks(connection, row.id, row.sid, row.length, row.num_bytes)
            outside = or_(payloads.c.position < 0, payloads.c.position >= row.length)
            found = select(func.count()).select_from(payloads).where(payloads.c.sid == row.sid, outside)
            if count := connection.execute(found).scalar_one():
                yield Problem(row.id, f"{count} payloads lie outside its {row.length} tokens")
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


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
