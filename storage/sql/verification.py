"""Reading a whole database and comparing it with what the contract promises. Changes nothing."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, Row, String, cast, func, or_, select
from sqlalchemy.exc import DatabaseError

from storage.base import CheckSettings, Damage, SessionKey
from storage.sql.failures import is_damage, trouble_with
from storage.sql.tables import blocks, deleted_sessions, idempotency, payloads, sessions, summaries


def problems(
    connection: Connection, structure: Callable[[Connection], Iterable[str]], check_settings: CheckSettings
) -> Iterator[Damage]:
    """What is wrong: what `structure` finds, each session's blocks and payloads, rows of no session.

    Raises what has nothing to do with stored bytes: a database that cannot be reached is not damaged.
    """
    try:
        for message in structure(connection):
            yield Damage(None, f"the database file is damaged: {message}")
        key = sessions.c.namespace, sessions.c.id
        columns = (*key, sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.first_position)
        settings = cast(sessions.c.settings, String).label("settings")
        for row in connection.execute(select(*columns, settings).order_by(*key)).all():
            session = SessionKey(row.namespace, row.id)
            if (trouble := trouble_with(row.settings, check_settings)) is not None:
                yield Damage(session, trouble)
            yield from _of_blocks(connection, session, row)
            outside = or_(payloads.c.position < row.first_position, payloads.c.position >= row.length)
            found = select(func.count()).select_from(payloads).where(payloads.c.sid == row.sid, outside)
            if count := connection.execute(found).scalar_one():
                yield Damage(session, f"{count} payloads lie outside its tokens, {row.first_position} to {row.length}")
        known = select(sessions.c.sid).union(select(deleted_sessions.c.sid))
        for table in (blocks, summaries, payloads, idempotency):
            orphans = select(func.count()).select_from(table).where(table.c.sid.not_in(known))
            if count := connection.execute(orphans).scalar_one():
                yield Damage(None, f"{count} rows of table {table.name} belong to no session")
    except DatabaseError as error:
        if not is_damage(error):
            raise
        yield Damage(None, f"the database file is damaged: {error.orig}")


def _of_blocks(connection: Connection, session: SessionKey, row: Row[Any]) -> Iterator[Damage]:
    length, num_bytes, first = row.length, row.num_bytes, row.first_position
    expected, total = None, 0
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == row.sid).order_by(blocks.c.start)
    with connection.execute(query, execution_options={"yield_per": 64}) as rows:
        for start, num_tokens, checksum, data in rows:
            if (
                expected is None
            ):  # the first block may begin before the first position: it goes when all of it is trimmed
                expected = start if start < first < start + num_tokens else first
            if start != expected:
                yield Damage(session, f"a block begins at position {start}, {expected} was expected")
            if zlib.crc32(data) != checksum:
                yield Damage(session, f"the block at position {start} does not match its checksum")
            expected = start + num_tokens
            total += len(data)
    if (expected or first) != length:
        yield Damage(session, f"its blocks end at position {expected or first}, its length is {length}")
    if total != num_bytes:
        yield Damage(session, f"its blocks hold {total} bytes, {num_bytes} are recorded")
