"""Taking what nobody needs any more out of a log: rows are deleted, and those that reach beyond are cut.

So nothing of it is left at rest. Positions and chunks keep their numbers. Runs within a transaction. Does not know
who needs what, nor what rows say.
"""

from __future__ import annotations

import zlib

from sqlalchemy import BindParameter, Column, Connection, bindparam, delete, exists, func, insert, select

from storage.sql.prepared import Prepared, Values
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

_LOG: BindParameter[int] = bindparam("log")
_START: BindParameter[int] = bindparam("start")
_STOP: BindParameter[int] = bindparam("stop")
_HAS_SKETCHES = Prepared(select(exists(select(sketches.c.first).where(sketches.c.log == _LOG))), "log")
"""Asked first, because most sessions have none, and those that trim come here with every few appends."""


class Statements:
    """The statements about rows that have items, made once: sessions that trim, or that an agent truncates, come here
    all the time.
    """

    def __init__(self, items: ItemsOf) -> None:
        (begin, num), table = items, items[0].table
        self.columns = [column.name for column in table.c]
        of_log = table.c.log == _LOG
        inside, span = (of_log, begin >= _START, begin + num <= _STOP, begin < _STOP), ("log", "start", "stop", "stop")
        self.size = Prepared(select(func.sum(func.length(table.c.data))).where(*inside), *span)
        self.delete = Prepared(delete(table).where(*inside), *span)
        last = select(func.max(begin)).where(of_log, begin < _START).scalar_subquery()
        into = of_log, begin == last, begin + num > _START
        self.into = Prepared(select(table).where(*into), "log", "log", "start", "start")
        """The row that begins before the range and reaches into it."""
        beyond = of_log, begin >= _START, begin < _STOP, begin + num > _STOP
        self.beyond = Prepared(select(table).where(*beyond), *span)
        self.delete_one = Prepared(delete(table).where(of_log, begin == _START), "log", "start")
        self.insert = Prepared(insert(table), *self.columns)


_STATEMENTS = {items: Statements(items) for items in (TOKENS, KEYS, SKETCHES)}
_DELETE_PAYLOADS = Prepared(
    delete(payloads).where(payloads.c.log == _LOG, payloads.c.position >= _START, payloads.c.position < _STOP),
    *("log", "start", "stop"),
)
_NO_END = 2**63 - 1


def remove(
    connection: Connection, log: int, start: int, stop: int | None, chunk_size: int | None, *, in_steps: bool = False
) -> tuple[int, bool]:
    """Remove positions start .. stop-1 (to the end when None), and what is kept of chunks that have their last token
    there; in steps, only some rows of many. How many bytes of tokens went, and whether more must.

    Without `chunk_size`, nothing of the log may be needed but what was never anybody else's.
    """
    is_left = _remove_payloads(connection, log, start, stop, in_steps)
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
    of, end = _STATEMENTS[items], _NO_END if stop is None else stop
    span, num_bytes, is_left = (log, start, end, end), 0, False
    if in_steps:
        is_left = _delete_some(connection, *items, log, start, end)
    else:
        num_bytes = int(of.size.first(connection, span)[0] or 0)
        of.delete.run(connection, [span])
    rows = of.into.all(connection, (log, log, start, start)) if start > 0 else []
    rows += of.beyond.all(connection, span) if stop is not None else []
    return num_bytes + sum(_cut(connection, items, row, start, end) for row in rows), is_left


def _remove_payloads(connection: Connection, log: int, start: int, stop: int | None, in_steps: bool) -> bool:
    """Delete the payloads of the range, in steps not all of many; whether there are more."""
    end = _NO_END if stop is None else stop
    if in_steps:
        return _delete_some(connection, payloads.c.position, None, log, start, end)
    _DELETE_PAYLOADS.run(connection, [(log, start, end)])
    return False


def _delete_some(
    connection: Connection, begin: Column[int], num: Column[int] | None, log: int, start: int, stop: int
) -> bool:
    """Delete some rows of the range; whether there are more."""
    table = begin.table
    inside = [table.c.log == log, begin >= start, begin < stop, *([begin + num <= stop] if num is not None else [])]
    most = ROWS_AT_ONCE[begin]
    some = select(begin).where(*inside).order_by(begin).limit(most)
    return connection.execute(delete(table).where(table.c.log == log, begin.in_(some))).rowcount == most


def _cut(connection: Connection, items: ItemsOf, values: Values, start: int, stop: int) -> int:
    """Keep of a row what lies outside of the range; how many bytes went. What is damaged stays so, and is found so."""
    (begin, num), of = items, _STATEMENTS[items]
    row = dict(zip(of.columns, values, strict=True))
    first, num_items = row[begin.name], row[num.name]
    end = first + num_items
    kept = [(first, min(end, start))] if first < start else []
    kept += [(max(first, stop), end)] if end > stop else []
    if kept == [(first, end)]:
        return 0
    data, spoil = row["data"], int(zlib.crc32(row["data"]) != row["checksum"])
    size = len(data) // num_items
    of.delete_one.run(connection, [(row["log"], first)])
    num_bytes = len(data)
    for low, high in kept:
        rest = data[(low - first) * size : (high - first) * size]
        num_bytes -= len(rest)
        new = {**row, begin.name: low, num.name: high - low, "checksum": zlib.crc32(rest) ^ spoil, "data": rest}
        of.insert.run(connection, [tuple(new.values())])
    return num_bytes
