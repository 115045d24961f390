"""Putting whole chunks in order at rest: their summaries kept, the small blocks that they came in joined.

A session that grows token by token is stored token by token; read back that way it would cost a row for each.
Runs within a write's transaction. Does not know what a summary says.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from storage.base import Refused, Seal, WrongLength
from storage.tables import blocks, summaries

BLOCK_BYTES = 64 << 10
"""A longer append is stored as several blocks, and blocks are joined up to this: bounds what a small read costs."""


def seal(connection: Connection, write: Seal, first_position: int) -> Refused | None:
    """Keep the summary and join the blocks of its chunks; None, or why not. The session begins at `first_position`."""
    table, summary = summaries.c, write.summary
    last = select(func.max(table.first + table.num_chunks)).where(table.sid == write.sid)
    end = max(connection.execute(last).scalar() or 0, first_position // write.chunk_size)
    if summary.first != end:
        return WrongLength(end)
    values = {
        "sid": write.sid,
        "first": summary.first,
        "num_chunks": summary.num_chunks,
        "checksum": zlib.crc32(summary.data),
        "data": summary.data,
    }
    connection.execute(insert(summaries).values(values))
    start = summary.first * write.chunk_size
    _join(connection, write.sid, start, start + summary.num_chunks * write.chunk_size)
    return None


def _join(connection: Connection, sid: int, start: int, stop: int) -> None:
    """Join the blocks that lie wholly within positions start .. stop-1."""
    columns = blocks.c
    inside = (columns.sid == sid, columns.start >= start, columns.start + columns.num_tokens <= stop)
    count, num_bytes = connection.execute(
        select(func.count(), func.coalesce(func.sum(func.length(columns.data)), 0)).where(*inside)
    ).one()
    if count <= num_bytes // BLOCK_BYTES + 1:
        return  # large already
    rows = connection.execute(select(blocks).where(*inside).order_by(columns.start)).all()
    if any(zlib.crc32(row.data) != row.checksum for row in rows):
        return  # damage stays where it is, under the checksum that shows it
    lots: list[list[Any]] = [[rows[0]]]
    num_bytes = len(rows[0].data)
    for before, row in pairwise(rows):
        num_bytes += len(row.data)
        if row.episode != before.episode or num_bytes > BLOCK_BYTES:
            lots.append([])
            num_bytes = len(row.data)
        lots[-1].append(row)
    connection.execute(delete(blocks).where(*inside))
    connection.execute(insert(blocks), [_joined(lot) for lot in lots])


def _joined(lot: list[Any]) -> dict[str, Any]:
    data = b"".join(row.data for row in lot)
    return {
        "sid": lot[0].sid,
        "start": lot[0].start,
        "num_tokens": sum(row.num_tokens for row in lot),
        "episode": lot[0].episode,
        "checksum": zlib.crc32(data),
        "data": data,
    }
