"""One moment of a store: the tables as one connection sees them in a transaction that only reads.

Does not know where connections come from, nor who writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, and_, exists, func, or_, select

from storage.base import Block, KeyRow, Quota, SessionKey, SessionRow, StoreDamaged, Summary
from storage.sql.tables import blocks, keys, payloads, quotas, sessions, summaries

ROWS_AT_ONCE = 64
"""Blocks fetched together while streaming; each is at most `rows.BLOCK_BYTES`, or one token."""
POSITIONS_AT_ONCE = 500
PAYLOADS_AT_ONCE = 16
"""Fetched together; each may have megabytes."""


class Snapshot:
    """See the head of this module."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def session(self, key: SessionKey) -> SessionRow | None:
        """The session of this name."""
        of_key = sessions.c.namespace == key.namespace, sessions.c.id == key.id
        row = self.connection.execute(select(sessions).where(*of_key)).first()
        return None if row is None else row_of(row)

    def sessions(self, query: Select[Any], at_once: int) -> Generator[SessionRow, None, None]:
        """Those of a query for rows of the table, without the ones whose settings are damaged."""
        with self.connection.execute(query, **_streamed(at_once)) as rows:
            for row in rows:
                if row.settings is not None:
                    yield row_of(row)

    def blocks(self, sid: int, start: int, stop: int | None) -> Iterator[Block]:
        """See `Store.read_blocks`."""
        end: int | None = None
        for block, checksum in self._stored_blocks(sid, start, stop):
            if end is None and block.start > start:  # the session begins there, or tokens are lost
                begin = select(sessions.c.first_position).where(sessions.c.sid == sid)
                end = max(start, self.connection.execute(begin).scalar_one())
            if end is not None and block.start > end:
                raise self._damaged(sid, end, f"the next tokens are those from {block.start} on")
            if zlib.crc32(block.data) != checksum:
                raise self._damaged(sid, block.start, "its checksum is wrong")
            end = block.start + block.num_tokens
            yield block

    def episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """See `Store.read_episodes`."""
        place, before = (
            func.lag(column).over(order_by=blocks.c.start) for column in (blocks.c.start, blocks.c.episode)
        )
        inner = select(blocks.c.start, blocks.c.episode, place.label("place"), before.label("before"))
        rows = inner.where(*_of(blocks, sid), blocks.c.start < stop).subquery()
        changed = or_(rows.c.place.is_(None), rows.c.episode.is_distinct_from(rows.c.before))
        query = select(rows.c.start, rows.c.episode).where(changed).order_by(rows.c.start)
        return [(start, episode) for start, episode in self.connection.execute(query)]

    def summaries(self, sid: int) -> Iterator[Summary]:
        """See `Store.read_summaries`."""
        end: int | None = None
        columns = (summaries.c.first, summaries.c.num_chunks, summaries.c.checksum, summaries.c.data)
        query = select(*columns).where(*_of(summaries, sid)).order_by(summaries.c.first)
        with self.connection.execute(query, **_streamed(ROWS_AT_ONCE)) as rows:
            for first, num_chunks, checksum, data in rows:
                if end not in (None, first) or zlib.crc32(data) != checksum:
                    return  # nothing is lost: what follows is computed again
                yield Summary(first, num_chunks, data)
                end = first + num_chunks

    def payloads(self, sid: int, positions: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        """Those at these positions, one after the other."""
        for place in range(0, len(positions), POSITIONS_AT_ONCE):
            some = positions[place : place + POSITIONS_AT_ONCE]
            yield from self._payloads(payloads.c.position.in_(some), sid, len(some))

    def payload_range(self, sid: int, start: int, stop: int) -> Generator[tuple[int, bytes], None, None]:
        """Those at positions start .. stop-1, one after the other."""
        inside = and_(payloads.c.position >= start, payloads.c.position < stop)
        return self._payloads(inside, sid, stop - start)

    def _payloads(self, where: ColumnElement[bool], sid: int, most: int) -> Generator[tuple[int, bytes], None, None]:
        options = {} if most <= PAYLOADS_AT_ONCE else _streamed(PAYLOADS_AT_ONCE)
        query = select(payloads.c.position, payloads.c.body).where(*_of(payloads, sid), where)
        with self.connection.execute(query, **options) as rows:
            yield from rows

    def sums(self, namespace: str | None) -> tuple[int, int, int]:
        """How many sessions, tokens and bytes of tokens there are, altogether or in one namespace."""
        num_held = sessions.c.length - sessions.c.first_position
        sums = select(func.count(), func.sum(num_held), func.sum(sessions.c.num_bytes)).select_from(sessions)
        if namespace is not None:
            sums = sums.where(sessions.c.namespace == namespace)
        num_sessions, num_tokens, num_bytes = self.connection.execute(sums).one()
        return num_sessions, int(num_tokens or 0), int(num_bytes or 0)

    def keys(self) -> list[KeyRow]:
        """See `Store.list_keys`."""
        query = select(keys).order_by(keys.c.namespace, keys.c.name)
        return [KeyRow(**row) for row in self.connection.execute(query).mappings()]

    def quota(self, namespace: str) -> Quota:
        """See `Store.get_quota`."""
        query = select(quotas).where(quotas.c.namespace == namespace)
        row = self.connection.execute(query).mappings().first()
        return Quota(namespace) if row is None else Quota(**row)

    def _stored_blocks(self, sid: int, start: int, stop: int | None) -> Iterator[tuple[Block, int]]:
        """The blocks that overlap positions start .. stop-1, each with its checksum."""
        if stop is not None and stop <= start:
            return
        is_small = stop is not None and stop - start <= ROWS_AT_ONCE  # no block is without a token
        options = {} if is_small else _streamed(ROWS_AT_ONCE)
        with self.connection.execute(_blocks_query(sid, start, stop), **options) as rows:
            for first, num_tokens, episode, checksum, data in rows:
                if first + num_tokens > start:
                    yield Block(first, num_tokens, data, episode), checksum

    def _damaged(self, sid: int, position: int, why: str) -> StoreDamaged:
        id_ = self.connection.execute(select(sessions.c.id).where(sessions.c.sid == sid)).scalar()
        return StoreDamaged(f"session {id_!r} is damaged at position {position}: {why}")


def row_of(row: Row[Any]) -> SessionRow:
    """A row of the table as the contract's record."""
    return SessionRow(
        id=row.id,
        settings=row.settings or {},
        created_at=row.created_at,
        max_tokens=row.max_tokens,
        sid=row.sid,
        length=row.length,
        num_bytes=row.num_bytes,
        updated_at=row.updated_at,
        first_position=row.first_position,
        namespace=row.namespace,
    )


def _streamed(num_rows: int) -> dict[str, Any]:
    """Options of a statement whose rows are fetched as they are taken."""
    return {"execution_options": {"yield_per": num_rows}}


def _of(table: Table, sid: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """That a row is this session's, and the session is there: of a deleted one some rows may be left."""
    return table.c.sid == sid, exists(select(sessions.c.sid).where(sessions.c.sid == sid))


def _blocks_query(sid: int, start: int, stop: int | None) -> Select[tuple[int, int, int | None, int, bytes]]:
    """The blocks from the one that holds position `start` on."""
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.episode, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(*_of(blocks, sid)).order_by(blocks.c.start)
    if start > 0:
        first = select(func.max(blocks.c.start)).where(blocks.c.sid == sid, blocks.c.start <= start)
        query = query.where(blocks.c.start >= func.coalesce(first.scalar_subquery(), 0))
    return query if stop is None else query.where(blocks.c.start < stop)
