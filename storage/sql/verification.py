"""Reading a whole database and comparing it with what the contract promises. Changes nothing."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, String, cast, func, or_, select
from sqlalchemy.exc import DatabaseError

from storage.base import CheckSettings, Problem
from storage.sql import journal
from storage.sql.failures import is_damage, trouble_with
from storage.sql.journal import Entry
from storage.sql.tables import blocks, deleted_sessions, idempotency, payloads, sessions, summaries


def problems(
    connection: Connection, structure: Callable[[Connection], Iterable[str]], check_settings: CheckSettings
) -> Iterator[Problem]:
    """What is wrong: what `structure` finds, each session's blocks and payloads, rows of no session.

    Raises what has nothing to do with stored bytes: a database that cannot be reached is not damaged.
    """
    try:
        for message in structure(connection):
            yield Problem(None, f"the database file is damaged: {message}")
        entries, damaged = journal.read(connection)
        for message in damaged.values():
            yield Problem(None, message)
        columns = (sessions.c.id, sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.first_position)
        settings = cast(sessions.c.settings, String).label("settings")
        for row in connection.execute(select(*columns, settings).order_by(sessions.c.id)).all():
            if (trouble := trouble_with(row.settings, check_settings)) is not None:
                yield Problem(row.id, trouble)
            yield from _of_blocks(connection, row)
            yield from _of_entries(row, entries.pop(row.sid, ()))
            outside = or_(payloads.c.position < row.first_position, payloads.c.position >= row.length)
            found = select(func.count()).select_from(payloads).where(payloads.c.sid == row.sid, outside)
            if count := connection.execute(found).scalar_one():
                yield Problem(row.id, f"{count} payloads lie outside its tokens, {row.first_position} to {row.length}")
        known = select(sessions.c.sid).union(select(deleted_sessions.c.sid))
        for table in (blocks, summaries, payloads, idempotency):
            orphans = select(func.count()).select_from(table).where(table.c.sid.not_in(known))
            if count := connection.execute(orphans).scalar_one():
                yield Problem(None, f"{count} rows of table {table.name} belong to no session")
        if entries:
            yield Problem(None, f"entries of the journal belong to no session: to {len(entries)} that are not there")
    except DatabaseError as error:
        if not is_damage(error):
            raise
        yield Problem(None, f"the database file is damaged: {error.orig}")


def _of_entries(row: Row[Any], entries: Sequence[Entry]) -> Iterator[Problem]:
    """Those that are not in the tables yet follow each other from the row's length on."""
    expected = row.length
    for entry in entries:
        if entry.start != expected:
            yield Problem(row.id, f"an append in the journal begins at position {entry.start}, {expected} was expected")
        if zlib.crc32(entry.data) != entry.checksum:
            yield Problem(row.id, f"the append in the journal at position {entry.start} does not match its checksum")
        expected = entry.end


def _of_blocks(connection: Connection, row: Row[Any]) -> Iterator[Problem]:
    session_id, length, num_bytes, first = row.id, row.length, row.num_bytes, row.first_position
    expected, total = None, 0
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == row.sid).order_by(blocks.c.start)
    with connection.execute(query, execution_options={"yield_per": 64}) as rows:
        for start, num_tokens, checksum, data in rows:
            if (
                expected is None
            ):  # the first block may begin before the first position: it goes when all of it is evicted
                expected = start if start < first < start + num_tokens else first
            if start != expected:
                yield Problem(session_id, f"a block begins at position {start}, {expected} was expected")
            if zlib.crc32(data) != checksum:
                yield Problem(session_id, f"the block at position {start} does not match its checksum")
            expected = start + num_tokens
            total += len(data)
    if (expected or first) != length:
        yield Problem(session_id, f"its blocks end at position {expected or first}, its length is {length}")
    if total != num_bytes:
        yield Problem(session_id, f"its blocks hold {total} bytes, {num_bytes} are recorded")
