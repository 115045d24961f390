"""The oldest whole chunks of a session that is full make room for an append.

Positions and chunks keep their numbers. A block or a summary goes once all of it was trimmed, so that nothing at
rest has to be cut; reads begin at the session's first position. Does not know what tokens say.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, func, select

from storage.sql.tables import blocks, payloads, summaries


def trim(connection: Connection, sid: int, first_position: int, chunk_size: int) -> int:
    """Delete what lies before `first_position`, a chunk's begin; how many bytes of tokens that was."""
    gone = (
        blocks.c.sid == sid,
        blocks.c.start < first_position,
        blocks.c.start + blocks.c.num_tokens <= first_position,
    )
    num_bytes = connection.execute(select(func.coalesce(func.sum(func.length(blocks.c.data)), 0)).where(*gone))
    count = int(num_bytes.scalar_one())
    connection.execute(delete(blocks).where(*gone))
    connection.execute(delete(payloads).where(payloads.c.sid == sid, payloads.c.position < first_position))
    last = summaries.c.first + summaries.c.num_chunks
    connection.execute(delete(summaries).where(summaries.c.sid == sid, last <= first_position // chunk_size))
    return count
