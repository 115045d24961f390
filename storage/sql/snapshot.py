"""One moment of a store: the tables as one connection sees them in a transaction that only reads.

Does not know where connections come from, nor who writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, and_, bindparam, func, or_, select

from storage.base import STAGED, Block, KeyRow, ModelRow, Quota, SessionKey, SessionRow, StoreDamaged, Summary
from storage.sql.prepared import Prepared
from storage.sql.tables import blocks, keys, models, payloads, quotas, sessions, sketches, summaries
from storage.sql.tokens.spans import Span, cut, layout_of

ROWS_AT_ONCE = 64
"""Blocks fetched together while streaming; each is at most `rows.BLOCK_BYTES`, or one token."""
PAYLOADS_AT_ONCE = 16
"""Fetched together; each may have megabytes."""
_PLACES = [f"at{place}" for place in range(PAYLOADS_AT_ONCE)]
_SOME_PAYLOADS = Prepared(
    select(payloads.c.position, payloads.c.body).where(
        payloads.c.log == bindparam("log"), payloads.c.position.in_([bindparam(name) for name in _PLACES])
    ),
    "log",
    *_PLACES,
)
"""Those at `PAYLOADS_AT_ONCE` positions; one may be there several times."""


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
        if (layout := layout_of(self.connection, sid)) is None:
            return
        end = max(start, layout.first_position)
        for span in layout.spans:
            for block, checksum in self._stored_blocks(span, start, stop):
                if block.start > end:
                    raise self._damaged(sid, end, f"the next tokens are those from {block.start} on")
                if zlib.crc32(block.data) != checksum:
                    raise self._damaged(sid, max(block.start, span.start), "its checksum is wrong")
                block = block.within(span.start, span.stop)
                end = block.start + block.num_tokens
                yield block

    def episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """See `Store.read_episodes`."""
        layout = layout_of(self.connection, sid)
        runs: list[tuple[int, int | None]] = []
        for span in cut(() if layout is None else layout.spans, 0, stop):
            for start, episode in self.connection.execute(_episodes_query(span)).all():
                if not runs or runs[-1][1] != episode:
                    runs.append((max(start, span.start), episode))
        return runs

    def summaries(self, sid: int) -> Iterator[Summary]:
        """See `Store.read_summaries`."""
        if (layout := layout_of(self.connection, sid)) is None:
            return
        end: int | None = None
        for log, first_chunk, last_chunk in layout.chunk_spans(layout.chunk_size):
            query = of_chunks(summaries, log, first_chunk, last_chunk)
            with self.connection.execute(query, **_streamed(ROWS_AT_ONCE)) as rows:
                for first, num_chunks, checksum, data in rows:
                    if end not in (None, max(first, first_chunk)) or zlib.crc32(data) != checksum:
                        return  # nothing is lost: what follows is computed again
                    summary = Summary(first, num_chunks, data).within(first_chunk, last_chunk)
                    end = summary.first + summary.num_chunks
                    yield summary
            if last_chunk is not None and (first_chunk if end is None else end) < last_chunk:
                return

    def sketches(self, sid: int, version: int) -> Iterator[Summary]:
        """See `Store.read_sketches`."""
        if (layout := layout_of(self.connection, sid)) is None:
            return
        for log, first_chunk, last_chunk in layout.chunk_spans(layout.chunk_size):
            query = of_chunks(sketches, log, first_chunk, last_chunk).where(sketches.c.version == version)
            with self.connection.execute(query, **_streamed(ROWS_AT_ONCE)) as rows:
                for first, num_chunks, checksum, data in rows:
                    if zlib.crc32(data) == checksum:
                        yield Summary(first, num_chunks, data).within(first_chunk, last_chunk)

    def payloads(self, sid: int, positions: Sequence[int]) -> Generator[tuple[int, bytes], None, None]:
        """Those at these positions, one after the other."""
        for span in self._spans(sid):
            inside = [position for position in positions if span.start <= position < span.stop]
            for place in range(0, len(inside), PAYLOADS_AT_ONCE):
                some = inside[place : place + PAYLOADS_AT_ONCE]
                some += some[:1] * (PAYLOADS_AT_ONCE - len(some))
                yield from _SOME_PAYLOADS.all(self.connection, (span.log, *some))

    def payload_range(self, sid: int, start: int, stop: int) -> Generator[tuple[int, bytes], None, None]:
        """Those at positions start .. stop-1, one after the other."""
        for log, low, high in cut(self._spans(sid), start, stop):
            yield from self._payloads(and_(payloads.c.position >= low, payloads.c.position < high), log, high - low)

    def _spans(self, sid: int) -> Sequence[Span]:
        """Where a session's tokens are; nowhere when it is deleted, of which some rows may be left."""
        layout = layout_of(self.connection, sid)
        return () if layout is None else layout.spans

    def _payloads(self, where: ColumnElement[bool], log: int, most: int) -> Generator[tuple[int, bytes], None, None]:
        options = {} if most <= PAYLOADS_AT_ONCE else _streamed(PAYLOADS_AT_ONCE)
        query = select(payloads.c.position, payloads.c.body).where(payloads.c.log == log, where)
        with self.connection.execute(query, **options) as rows:
            yield from rows

    def sums(self, namespace: str | None) -> tuple[int, int, int]:
        """How many sessions, tokens and bytes of tokens there are, altogether or in one namespace."""
        num_held = sessions.c.length - sessions.c.first_position
        sums = select(func.count(), func.sum(num_held), func.sum(sessions.c.num_bytes)).select_from(sessions)
        of_namespace = sessions.c.namespace
        sums = sums.where(of_namespace != STAGED if namespace is None else of_namespace == namespace)
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

    def models(self) -> list[ModelRow]:
        """See `Store.list_models`."""
        query = select(models).order_by(models.c.namespace, models.c.name)
        return [model_of(row) for row in self.connection.execute(query)]

    def model_bytes(self, namespace: str | None) -> int:
        """How many bytes models have, altogether or in one namespace."""
        query = select(func.sum(models.c.num_bytes))
        if namespace is not None:
            query = query.where(models.c.namespace == namespace)
        return int(self.connection.execute(query).scalar_one() or 0)

    def session_counts(self, namespace: str, model: str | None) -> dict[str, int]:
        """See `Store.count_sessions`."""
        columns = sessions.c.model, func.count().label("num_sessions")
        query = select(*columns).where(sessions.c.namespace == namespace)
        query = query.where(sessions.c.model.is_not(None) if model is None else sessions.c.model == model)
        return {row.model: row.num_sessions for row in self.connection.execute(query.group_by(sessions.c.model))}

    def _stored_blocks(self, span: Span, start: int, stop: int | None) -> Iterator[tuple[Block, int]]:
        """The blocks of a span that overlap positions start .. stop-1, as they are stored, each with its checksum."""
        start, stop = max(start, span.start), span.stop if stop is None else min(stop, span.stop)
        if stop <= start:
            return
        options = {} if stop - start <= ROWS_AT_ONCE else _streamed(ROWS_AT_ONCE)  # no block is without a token
        with self.connection.execute(_blocks_query(span.log, start, stop), **options) as rows:
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


def model_of(row: Row[Any]) -> ModelRow:
    """A row of the table as the contract's record."""
    return ModelRow(row.namespace, row.name, row.hash, row.config or {}, row.num_bytes, row.created_at, row.version)


def _streamed(num_rows: int) -> dict[str, Any]:
    """Options of a statement whose rows are fetched as they are taken."""
    return {"execution_options": {"yield_per": num_rows}}


def _blocks_query(log: int, start: int, stop: int) -> Select[tuple[int, int, int | None, int, bytes]]:
    """The blocks of a log from the one that holds position `start` on."""
    columns = (blocks.c.start, blocks.c.num_tokens, blocks.c.episode, blocks.c.checksum, blocks.c.data)
    query = select(*columns).where(blocks.c.log == log, blocks.c.start < stop).order_by(blocks.c.start)
    if start > 0:
        first = select(func.max(blocks.c.start)).where(blocks.c.log == log, blocks.c.start <= start)
        query = query.where(blocks.c.start >= func.coalesce(first.scalar_subquery(), 0))
    return query


def _episodes_query(span: Span) -> Select[int, int | None]:
    """Where, in a span, the episode changes."""
    place, before = (func.lag(column).over(order_by=blocks.c.start) for column in (blocks.c.start, blocks.c.episode))
    inside = blocks.c.log == span.log, blocks.c.start < span.stop, blocks.c.start + blocks.c.num_tokens > span.start
    rows = select(blocks.c.start, blocks.c.episode, place.label("place"), before.label("before")).where(*inside)
    found = rows.subquery()
    changed = or_(found.c.place.is_(None), found.c.episode.is_distinct_from(found.c.before))
    return select(found.c.start, found.c.episode).where(changed).order_by(found.c.start)


def of_chunks(table: Table, log: int, first: int, last: int | None) -> Select[int, int, int, bytes]:
    """The summaries, or sketches, that have chunks of first .. last-1."""
    of = table.c
    inside = [of.log == log, of.first + of.num_chunks > first]
    if last is not None:
        inside.append(of.first < last)
    return select(of.first, of.num_chunks, of.checksum, of.data).where(*inside).order_by(of.first)
