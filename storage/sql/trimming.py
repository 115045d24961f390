"""The oldest whole chunks of a session that is full make room for an append.

Positions and chunks keep their numbers. A block or a summary of which a part was trimmed is cut, so that nothing that
was trimmed is left at rest. Does not know what tokens say.
"""

from __future__ import annotations

import zlib

from sqlalchemy import Column, Connection, delete, func, select, update

from storage.sql.tables import blocks, payloads, summaries


def trim(connection: Connection, sid: int, first_position: int, chunk_size: int) -> int:
    """Delete what lies before `first_position`, a chunk's begin; how many bytes of tokens that was."""
    first_chunk = first_position // chunk_size
    connection.execute(delete(payloads).where(payloads.c.sid == sid, payloads.c.position < first_position))
    _delete_before(connection, summaries.c.first, summaries.c.num_chunks, sid, first_chunk)
    return _delete_before(connection, blocks.c.start, blocks.c.num_tokens, sid, first_position)


def _delete_before(connection: Connection, start: Column[int], num: Column[int], sid: int, first: int) -> int:
    """Delete the rows whose `num` items all lie before the item `first`, and cut the one that reaches beyond it; how
    many bytes of data that was.
    """
    table = start.table
    begun = table.c.sid == sid, start < first
    gone = *begun, start + num <= first
    num_bytes = int(
        connection.execute(select(func.coalesce(func.sum(func.length(table.c.data)), 0)).where(*gone)).scalar_one()
    )
    connection.execute(delete(table).where(*gone))
    row = connection.execute(select(start, num, table.c.checksum, table.c.data).where(*begun)).first()
    if row is None or zlib.crc32(row.data) != row.checksum:  # what is damaged stays as it is, and is found so
        return num_bytes
    num_cut = first - row[0]
    rest = row.data[len(row.data) // row[1] * num_cut :]
    values = {start: first, num: row[1] - num_cut, table.c.checksum: zlib.crc32(rest), table.c.data: rest}
    connection.execute(update(table).where(table.c.sid == sid, start == row[0]).values(values))
    return num_bytes + len(row.data) - len(rest)
