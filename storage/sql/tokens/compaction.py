"""Putting whole chunks in order at rest: their summaries and sketches kept, the small blocks that they came in joined.

A session that grows token by token is stored token by token; read back that way it would cost a row for each.
Runs within a write's transaction. Does not know what a summary or a sketch says.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from storage.base import Compact, KeepSketches, Refused, Summary, WrongLength
from storage.sql.prepared import Values
from storage.sql.tables import blocks, sketches, summaries
from storage.sql.tokens.removal import remove_sketches
from storage.sql.tokens.rows import BLOCK_BYTES, INSERT_BLOCKS
from storage.sql.tokens.spans import Layout, layout_of


def compact(connection: Connection, write: Compact) -> Refused | None:
    """Keep the summary and join the blocks of its chunks; None, or why not.

    What lies in a log that others read too is compacted for them as well: they see the same tokens there.
    """
    layout, summary, size = layout_of(connection, write.sid), write.summary, write.chunk_size
    assert layout is not None, "it was looked up"
    if summary.first != (end := _end(connection, layout, size)):
        return WrongLength(end)
    for log, part in _parts(layout, summary, size):
        connection.execute(insert(summaries).values(_row(log, part)))
        _join(connection, log, part.first * size, (part.first + part.num_chunks) * size)
    return None


def keep_sketches(connection: Connection, write: KeepSketches) -> None:
    """Keep sketches, instead of what is there of these chunks: damaged, of another version, or the same."""
    layout = layout_of(connection, write.sid)
    assert layout is not None, "it was looked up"
    for log, part in _parts(layout, write.sketches, write.chunk_size):
        remove_sketches(connection, log, part.first, part.first + part.num_chunks)
        connection.execute(insert(sketches).values({**_row(log, part), "version": write.version}))


def _parts(layout: Layout, summary: Summary, chunk_size: int) -> Iterator[tuple[int, Summary]]:
    """What of it belongs to which log; what was trimmed, to none."""
    for log, first_chunk, last_chunk in layout.chunk_spans(chunk_size):
        if summary.first + summary.num_chunks > first_chunk and (last_chunk is None or summary.first < last_chunk):
            yield log, summary.within(first_chunk, last_chunk)


def _row(log: int, part: Summary) -> dict[str, Any]:
    checksum = zlib.crc32(part.data)
    return {"log": log, "first": part.first, "num_chunks": part.num_chunks, "checksum": checksum, "data": part.data}


def _end(connection: Connection, layout: Layout, chunk_size: int) -> int:
    """The first chunk of a session that has no summary."""
    table, end = summaries.c, layout.first_position // chunk_size
    for log, _, last_chunk in layout.chunk_spans(chunk_size):
        here = select(func.max(table.first + table.num_chunks)).where(table.log == log)
        if last_chunk is None:
            return max(end, connection.execute(here).scalar() or 0)
        found = connection.execute(here.where(table.first < last_chunk)).scalar() or 0
        end = max(end, min(found, last_chunk))
        if end < last_chunk:
            break
    return end


def _join(connection: Connection, log: int, start: int, stop: int) -> None:
    """Join the small blocks of a log that lie wholly within positions start .. stop-1; the others are not touched."""
    columns = blocks.c
    is_small = func.length(columns.data) <= BLOCK_BYTES // 2
    inside = (columns.log == log, columns.start >= start, columns.start + columns.num_tokens <= stop, is_small)
    count, num_bytes = connection.execute(
        select(func.count(), func.coalesce(func.sum(func.length(columns.data)), 0)).where(*inside)
    ).one()
    if count <= num_bytes // BLOCK_BYTES + 1:
        return  # large already
    rows = connection.execute(select(blocks).where(*inside).order_by(columns.start)).all()
    connection.execute(delete(blocks).where(*inside))
    INSERT_BLOCKS.run(connection, list(joined(rows)))


def joined(rows: Iterable[Any]) -> Iterator[Values]:
    """Rows in the order of their positions as fewer blocks: of neighbours of one episode, and at most BLOCK_BYTES
    unless one row is larger.

    What is damaged stays by itself, under the checksum that shows it.
    """
    together: list[Any] = []
    num_bytes = end = 0
    for row in rows:
        is_sound = zlib.crc32(row.data) == row.checksum
        is_next = row.start == end and together and row.episode == together[-1].episode  # after a gap no token moves
        num_bytes += len(row.data)
        if together and not (is_sound and is_next and num_bytes <= BLOCK_BYTES):
            yield _joined(together)
            together, num_bytes = [], len(row.data)
        together.append(row)
        end = row.start + row.num_tokens
        if not is_sound:
            yield _joined(together)
            together, num_bytes = [], 0
    if together:
        yield _joined(together)


def _joined(together: Sequence[Any]) -> Values:
    first = together[0]
    if len(together) == 1:
        return first.log, first.start, first.num_tokens, first.episode, first.checksum, first.data
    data = b"".join(row.data for row in together)
    return first.log, first.start, sum(row.num_tokens for row in together), first.episode, zlib.crc32(data), data
