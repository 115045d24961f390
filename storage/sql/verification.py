"""Reading a whole database and comparing it with what the contract promises. Changes nothing."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, String, Table, cast, func, or_, select
from sqlalchemy.exc import DatabaseError

from storage.base import CheckSettings, Damage, SessionKey
from storage.sql.failures import is_damage, trouble_with
from storage.sql.namespaces.models import damage_of
from storage.sql.snapshot import Snapshot, of_chunks
from storage.sql.tables import blocks, idempotency, leftovers, payloads, sessions, sketches, spans, summaries
from storage.sql.tokens.spans import Layout, Span, known_logs, layout_of, needs_of, shared_until


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
            yield from (Damage(session, trouble) for trouble in damaged_chunks(connection, row.sid))
            if count := connection.execute(_payloads_outside(connection, row.sid)).scalar_one():
                yield Damage(session, f"{count} payloads lie outside its tokens, {row.first_position} to {row.length}")
        yield from _of_models(connection)
        yield from _orphans(connection)
    except DatabaseError as error:
        if not is_damage(error):
            raise
        yield Damage(None, f"the database file is damaged: {error.orig}")


def _payloads_outside(connection: Connection, sid: int) -> Select[int]:
    """How many payloads are in a session's own log that are neither its own nor anybody else's."""
    layout = layout_of(connection, sid)
    assert layout is not None, "in this snapshot it is there"
    return select(func.count()).select_from(payloads).where(*outside(connection, layout))


def _orphans(connection: Connection) -> Iterator[Damage]:
    """Rows that belong to nobody."""
    known = select(sessions.c.sid)
    for table, column, owners in (
        *((table, table.c.log, known_logs()) for table in (blocks, summaries, sketches, payloads)),
        (idempotency, idempotency.c.sid, known.union(select(leftovers.c.log))),
        (spans, spans.c.sid, known),
    ):
        orphans = select(func.count()).select_from(table).where(column.not_in(owners))
        if count := connection.execute(orphans).scalar_one():
            yield Damage(None, f"{count} rows of table {table.name} belong to no session")


def outside(connection: Connection, layout: Layout) -> tuple[ColumnElement[bool], ...]:
    """That a payload is in a session's own log, before or after all that this session or another one has there."""
    ranges = needs_of(connection, layout.log).ranges
    first = ranges[0][0]
    last = max(layout.length, *(stop or 0 for _, stop in ranges))
    return payloads.c.log == layout.log, or_(payloads.c.position < first, payloads.c.position >= last)


def _of_models(connection: Connection) -> Iterator[Damage]:
    """What is wrong with models' bytes; those of no model are purged by the next server."""
    for model in Snapshot(connection).models():
        if (trouble := damage_of(connection, model)) is not None:
            yield Damage(None, f"model {model.name!r} of namespace {model.namespace!r} is damaged: {trouble}")


def _of_blocks(connection: Connection, session: SessionKey, row: Row[Any]) -> Iterator[Damage]:
    length, num_bytes, expected, total = row.length, row.num_bytes, row.first_position, 0
    for block in stored(connection, row.sid):
        if block.start != expected:
            yield Damage(session, f"a block begins at position {block.start}, {expected} was expected")
        if not block.is_sound:
            yield Damage(session, f"the block at position {block.start} does not match its checksum")
        expected = block.start + block.num_tokens
        total += block.num_bytes
    if expected != length:
        yield Damage(session, f"its blocks end at position {expected}, its length is {length}")
    if total != num_bytes:
        yield Damage(session, f"its blocks hold {total} bytes, {num_bytes} are recorded")


def damaged_chunks(connection: Connection, sid: int) -> Iterator[str]:
    """What is wrong with the summaries and sketches that a session reads: nothing that cannot be made again."""
    layout = layout_of(connection, sid)
    assert layout is not None, "in this snapshot it is there"
    for table in (summaries, sketches):
        for span in layout.chunk_spans(layout.chunk_size):
            yield from _damaged_chunks(connection, table, *span)


def _damaged_chunks(connection: Connection, table: Table, log: int, first: int, last: int | None) -> Iterator[str]:
    with connection.execute(of_chunks(table, log, first, last), execution_options={"yield_per": 64}) as rows:
        for begin, num_chunks, checksum, data in rows:
            if zlib.crc32(data) != checksum:
                yield f"the {table.name} of the chunks {begin} to {begin + num_chunks - 1} do not match their checksum"


class Stored(NamedTuple):
    """What a session has of one block."""

    start: int
    num_tokens: int
    num_bytes: int
    is_sound: bool


def stored(connection: Connection, sid: int) -> Iterator[Stored]:
    """A session's blocks, the damaged ones too. Of a log that others share only what is the session's; else also what
    should not be there.
    """
    layout = layout_of(connection, sid)
    assert layout is not None, "in this snapshot it is there"
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.checksum, blocks.c.data)
    is_shared = shared_until(connection, layout.log, sid) > 0
    begin = max(layout.own_start, layout.first_position)
    own = Span(layout.log, begin if is_shared else 0, sys.maxsize)
    for span in (*layout.shared, own):
        least = begin if span is own else span.start
        inside = blocks.c.log == span.log, blocks.c.start < span.stop, blocks.c.start + blocks.c.num_tokens > span.start
        query = select(*columns).where(*inside).order_by(blocks.c.start)
        with connection.execute(query, execution_options={"yield_per": 64}) as rows:
            for start, num_tokens, checksum, data in rows:
                is_begun = start < least < start + num_tokens  # earlier versions left it so where it was damaged
                first, last = least if is_begun else start, min(start + num_tokens, span.stop)
                num_bytes = len(data) * (last - first) // num_tokens
                yield Stored(first, last - first, num_bytes, zlib.crc32(data) == checksum)
