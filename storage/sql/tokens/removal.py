"""Taking what nobody needs any more out of a log: rows are deleted, and those that reach beyond are cut.

So nothing of it is left at rest. Positions and chunks keep their numbers. Runs within a transaction. Does not know
who needs what, nor what rows say.
"""

from __future__ import annotations

import zlib

from sqlalchemy import Column, Connection, RowMapping, bindparam, delete, exists, func, insert, select

from storage.sql.prepared import Prepared
from storage.sql.tables import blocks, payloads, sketches, summaries

ROWS_AT_ONCE = {
    blocks.c.start: 64,  # of at most rows.BLOCK_BYTES each, or one token: 4 MiB
    summaries.c.first: 32,
    sketches.c.first: 32,
    payloads.c.position: 512,
}
"""Per table, by the column that is its key within a log: how many rows one step deletes."""

ItemsOf = tuple[Column[int], Column[int]]
"""Of a table, what its rows begin with and how many they have."""
TOKENS: ItemsOf = blocks.c.start, blocks.c.num_tokens
KEYS: ItemsOf = summaries.c.first, summaries.c.num_chunks
SKETCHES: ItemsOf = sketches.c.first, sketches.c.num_chunks

_HAS_SKETCHES = Prepared(select(exists(select(sketches.c.first).where(sketches.c.log == bindparam("log")))), "log")
"""Asked first, because most sessions have none, and those that trim come here with every few appends."""


def remove(
    connection: Connection, log: int, start: int, stop: int | None, chunk_size: int | None, *, in_steps: bool = False
) -> tuple[int, bool]:
    """Remove positions start .. stop-1 (to the end when None), and what is kept of chunks that have their last token
    there; in steps, only some rows of many. How many bytes of tokens went, and whether more must.

    Without `chunk_size`, nothing of the log may be needed but what was never anybody else's.
    """
    is_left = _delete_some(connection, payloads.c.position, None, log, start, stop, in_steps)
    first, last = start, stop
    if chunk_size is not None:
        first, last = start // chunk_size, None if stop is None else stop // chunk_size
    if last is None or first < last:
        is_left |= _remove_items(connection, KEYS, log, first, last, in_steps)[1]
        if _HAS_SKETCHES.first(connection, (log,))[0]:
            is_left |= _remove_items(connection, SKETCHES, log, first, last, in_steps)[1]
    num_bytes, more = _remove_items(connection, TOKENS, log, start, stop, in_steps)
    return num_bytes, is_left or more


def remove_sketches(connection: Connection, log: int, first: int, last: int) -> None:
    """Remove the sketches of the chunks first .. last-1."""
    _remove_items(connection, SKETCHES, log, first, last, in_steps=False)


def _remove_items(
    connection: Connection, items: ItemsOf, log: int, start: int, stop: int | None, in_steps: bool
) -> tuple[int, bool]:
    """Delete the rows whose items all lie in the range, and cut those that reach into it."""
    (begin, num), table = items, items[0].table
    inside = [table.c.log == log, begin >= start, *([begin + num <= stop, begin < stop] if stop is not None else [])]
    num_bytes = 0
    if not in_steps:
        size = func.coalesce(func.sum(func.length(table.c.data)), 0)
        num_bytes = int(connection.execute(select(size).where(*inside)).scalar_one())
    is_left = _delete_some(connection, begin, num, log, start, stop, in_steps)
    rows: list[RowMapping] = []
    if start > 0:
        last = select(func.max(begin)).where(table.c.log == log, begin < start).scalar_subquery()
        rows += connection.execute(select(table).where(table.c.log == log, begin == last)).mappings()
    if stop is not None:
        after = table.c.log == log, begin >= start, begin < stop, begin + num > stop
        rows += connection.execute(select(table).where(*after)).mappings()
    return num_bytes + sum(_cut(connection, items, row, start, stop) for row in rows), is_left


def _delete_some(
    connection: Connection,
    begin: Column[int],
    num: Column[int] | None,
    log: int,
    start: int,
    stop: int | None,
    in_steps: bool,
) -> bool:
    """Delete rows of the range, in steps not all of many; whether there are more."""
    table = begin.table
    inside = [table.c.log == log, begin >= start]
    if stop is not None:
        inside += [begin < stop, *([begin + num <= stop] if num is not None else [])]
    if not in_steps:
        connection.execute(delete(table).where(*inside))
        return False
    most = ROWS_AT_ONCE[begin]
    some = select(begin).where(*inside).order_by(begin).limit(most)
    return connection.execute(delete(table).where(table.c.log == log, begin.in_(some))).rowcount == most


def _cut(connection: Connection, items: ItemsOf, row: RowMapping, start: int, stop: int | None) -> int:
    """Keep of a row what lies outside of the range; how many bytes went. What is damaged stays so, and is found so."""
    begin, num = items
    table, first, num_items = begin.table, row[begin.name], row[num.name]
    end = first + num_items
    kept = [(first, min(end, start))] if first < start else []
    kept += [(max(first, stop), end)] if stop is not None and end > stop else []
    if kept == [(first, end)]:
        return 0
    data, spoil = row["data"], int(zlib.crc32(row["data"]) != row["checksum"])
    size = len(data) // num_items
    connection.execute(delete(table).where(table.c.log == row["log"], begin == first))
    num_bytes = len(data)
    for low, high in kept:
        rest = data[(low - first) * size : (high - first) * size]
        num_bytes -= len(rest)
        values = {begin.name: low, num.name: high - low, "checksum": zlib.crc32(rest) ^ spoil, "data": rest}
        connection.execute(insert(table).values({**row, **values}))
    return num_bytes
