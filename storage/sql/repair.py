"""What of a damaged database can be kept, and keeping just that: of each session the tokens up to the first damage.

A token after a gap has a position that nothing vouches for, so it goes as well. Nothing is changed before it is
known what will be lost. Does not repair the structure of a file: that is SQLite's, and a backup's, to do.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from sqlalchemy import Connection, Row, String, cast, delete, or_, select, update

from storage.base import CheckSettings, SessionKey
from storage.sql.deletion import leave
from storage.sql.failures import trouble_with
from storage.sql.tables import blocks, deleted_sessions, idempotency, payloads, sessions, summaries


@dataclass(frozen=True, slots=True)
class Repair:
    """What is to be done to one session; `length` None: it goes altogether. `message` says what is lost, and why."""

    session: SessionKey
    sid: int
    length: int | None
    num_bytes: int
    message: str


def plan(connection: Connection, check_settings: CheckSettings) -> list[Repair]:
    """The repairs that are needed, in the order of the sessions' keys. Reads everything, changes nothing."""
    key = sessions.c.namespace, sessions.c.id
    columns = (*key, sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.first_position)
    settings = cast(sessions.c.settings, String).label("settings")
    rows = connection.execute(select(*columns, settings).order_by(*key)).all()
    found = (_of_session(connection, row, check_settings) for row in rows)
    return [repair for repair in found if repair is not None]


def carry_out(connection: Connection, repairs: list[Repair]) -> None:
    """Do what was planned, and delete what belongs to no session or lies outside of one."""
    for repair in repairs:
        of_session = sessions.c.sid == repair.sid
        if repair.length is None:
            connection.execute(delete(sessions).where(of_session))
            leave(connection, repair.sid)
            continue
        connection.execute(update(sessions).where(of_session).values(length=repair.length, num_bytes=repair.num_bytes))
        connection.execute(delete(blocks).where(blocks.c.sid == repair.sid, blocks.c.start >= repair.length))
        connection.execute(delete(summaries).where(summaries.c.sid == repair.sid))  # they are computed again
        # A repeated append must write again what is lost.
        lost = idempotency.c.sid == repair.sid, idempotency.c.length > repair.length
        connection.execute(delete(idempotency).where(*lost))
    known = select(sessions.c.sid).union(select(deleted_sessions.c.sid))
    for table in (blocks, summaries, payloads, idempotency):
        connection.execute(delete(table).where(table.c.sid.not_in(known)))
    for row in connection.execute(select(sessions.c.sid, sessions.c.length, sessions.c.first_position)).all():
        outside = or_(payloads.c.position < row.first_position, payloads.c.position >= row.length)
        connection.execute(delete(payloads).where(payloads.c.sid == row.sid, outside))


def _of_session(connection: Connection, row: Row[tuple[object, ...]], check_settings: CheckSettings) -> Repair | None:
    session, num_tokens = SessionKey(row.namespace, row.id), row.length - row.first_position
    if (trouble := trouble_with(row.settings, check_settings)) is not None:
        return Repair(session, row.sid, None, 0, f"all of it, {num_tokens} tokens, because {trouble}")
    length, num_bytes, why = _readable(connection, row)
    if length < row.length:
        lost = f"the tokens {length} to {row.length - 1}, {row.length - length} of {num_tokens}, because {why}"
    elif length > row.length or num_bytes != row.num_bytes:
        lost = "nothing; its record of length or bytes is put right"
    else:
        return None
    return Repair(session, row.sid, length, num_bytes, lost)


def _readable(connection: Connection, row: Row[tuple[object, ...]]) -> tuple[int, int, str]:
    """Up to which position a session's tokens are whole, how many bytes that is, and why no more."""
    end, num_bytes = row.first_position, 0
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.sid == row.sid).order_by(blocks.c.start)
    with connection.execute(query, execution_options={"yield_per": 64}) as rows:
        for start, num_tokens, checksum, data in rows:
            is_first = num_bytes == 0 and start < row.first_position < start + num_tokens
            if start != end and not is_first:
                return end, num_bytes, f"those from {end} to {start - 1} are missing"
            if zlib.crc32(data) != checksum:
                return end, num_bytes, f"the block at position {start} does not match its checksum"
            end = start + num_tokens
            num_bytes += len(data)
    return end, num_bytes, f"those from {end} on are missing"
