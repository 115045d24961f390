"""Where the tokens of sessions lie: the rows of blocks, summaries and payloads belong to logs, and a session is a list
of spans of logs, the last of which is that to which it appends.

A log is one session's at first and bears its number. Whoever forks shares spans of it; who truncates what others share
goes on in a log of a new number, below zero, so that no log ever has two rows for one position. Chunks that reach over
a log's beginning are those of the log that holds their last token. Runs within a transaction. Does not know what rows
say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import CompoundSelect, Connection, bindparam, delete, exists, func, insert, or_, select

from storage.sql.prepared import Prepared
from storage.sql.tables import leftovers, sessions, spans

_SPANS = (
    select(
        *(sessions.c.first_position, sessions.c.length, spans.c.start, spans.c.stop, spans.c.log, spans.c.chunk_size)
    )
    .join_from(sessions, spans, spans.c.sid == sessions.c.sid, isouter=True)
    .where(sessions.c.sid == bindparam("of_sid"))
    .order_by(spans.c.start)
)
"""A session with its spans: written once, because SQLAlchemy takes as long to put it together as to ask it."""
_SHARED_UNTIL = Prepared(
    select(func.max(spans.c.stop)).where(spans.c.log == bindparam("of_log"), spans.c.sid != bindparam("but_sid")),
    *("of_log", "but_sid"),
)


HAS_BRANCHED = or_(
    exists(select(spans.c.sid).where(spans.c.sid == sessions.c.sid)),
    exists(select(spans.c.sid).where(spans.c.log == sessions.c.sid)),
).label("has_branched")
"""Whether a session of the table has spans, or another one has some of its first log."""
OWN_LOG = func.coalesce(
    select(spans.c.log).where(spans.c.sid == sessions.c.sid, spans.c.stop.is_(None)).scalar_subquery(), sessions.c.sid
).label("log")
"""The log to which a session of the table appends."""


class Span(NamedTuple):
    """Positions `start` .. `stop`-1 of a session are in `log`."""

    log: int
    start: int
    stop: int


class Layout(NamedTuple):
    """Where one session lies: its positions first_position .. length-1."""

    first_position: int
    length: int
    shared: list[Span]
    """In logs that it does not append to, in order."""
    log: int
    """To which it appends, from `own_start` on."""
    own_start: int
    chunk_size: int | None
    """Where it has spans."""

    @property
    def spans(self) -> list[Span]:
        """All of it, in order and without a gap; none is empty."""
        own = Span(self.log, max(self.own_start, self.first_position), self.length)
        return [*self.shared, own] if own.start < own.stop else self.shared

    def chunk_spans(self, chunk_size: int | None) -> Iterator[tuple[int, int, int | None]]:
        """In which logs the summaries of its chunks first .. last-1 are, without an end in the log it appends to."""
        if chunk_size is not None:
            yield from ((log, start // chunk_size, stop // chunk_size) for log, start, stop in self.shared)
        begin = max(self.own_start, self.first_position)
        yield self.log, 0 if chunk_size is None else begin // chunk_size, None

    @property
    def logs(self) -> set[int]:
        """All logs of which it may have rows."""
        return {self.log, *(span.log for span in self.shared)}


def layout_of(connection: Connection, sid: int) -> Layout | None:
    """Where a session lies, or None when it is not there."""
    rows = connection.execute(_SPANS, {"of_sid": sid}).all()
    if not rows:
        return None
    first_position, length, *_, chunk_size = rows[0]
    shared = [Span(row.log, row.start, row.stop) for row in rows if row.stop is not None]
    log, own_start = sid, shared[-1].stop if shared else 0
    for row in rows:
        if row.log is not None and row.stop is None:
            log, own_start = row.log, row.start
    return Layout(first_position, length, shared, log, own_start, chunk_size)


def lay(connection: Connection, sid: int, layout: Layout) -> None:
    """Write down where a session lies; its row, with the rest of the layout, is there."""
    connection.execute(delete(spans).where(spans.c.sid == sid))
    rows: list[tuple[int, int, int | None]] = [*layout.shared]
    if layout.log != sid:
        rows.append((layout.log, layout.own_start, None))
    if rows:
        named = [
            {"sid": sid, "start": start, "stop": stop, "log": log, "chunk_size": layout.chunk_size}
            for log, start, stop in rows
        ]
        connection.execute(insert(spans), named)


def cut(shared: Iterable[Span], start: int, stop: int) -> list[Span]:
    """What of spans lies within positions start .. stop-1."""
    within = (span._replace(start=max(span.start, start), stop=min(span.stop, stop)) for span in shared)
    return [span for span in within if span.start < span.stop]


def new_log(connection: Connection) -> int:
    """The number of a log that has no rows, and will not be another's."""
    least = (select(func.min(table.c.log)).scalar_subquery() for table in (spans, leftovers))
    return min(0, *(number or 0 for number in connection.execute(select(*least)).one())) - 1


def shared_until(connection: Connection, log: int, sid: int) -> int:
    """Up to which position other sessions than this one have tokens in a log; 0: none has."""
    return int(_SHARED_UNTIL.first(connection, (log, sid))[0] or 0)


class Needs(NamedTuple):
    """Which positions of a log sessions have, as disjoint ranges in order; the last may have no end."""

    ranges: Sequence[tuple[int, int | None]]
    chunk_size: int | None
    """Where more than one session had to do with the log."""


def needs_of(connection: Connection, log: int) -> Needs:
    """What of a log sessions have."""
    columns = spans.c.start, spans.c.stop, spans.c.chunk_size, sessions.c.first_position
    query = select(*columns).join_from(spans, sessions, spans.c.sid == sessions.c.sid).where(spans.c.log == log)
    rows = connection.execute(query).all()
    found = [(max(row.start, row.first_position), row.stop) for row in rows]
    layout = layout_of(connection, log) if log > 0 else None
    if layout is not None and layout.log == log:
        found.append((max(layout.own_start, layout.first_position), None))
    return Needs(_union(found), rows[0].chunk_size if rows else None)


def _union(ranges: Iterable[tuple[int, int | None]]) -> list[tuple[int, int | None]]:
    together: list[tuple[int, int | None]] = []
    for start, stop in sorted(ranges, key=lambda one: one[0]):
        if together and (together[-1][1] is None or start <= together[-1][1]):
            first, last = together[-1]
            together[-1] = first, None if last is None or stop is None else max(last, stop)
        elif stop is None or start < stop:
            together.append((start, stop))
    return together


def known_logs() -> CompoundSelect[Any]:
    """Logs that belong to a session, or are left to be purged."""
    moved = select(spans.c.sid).where(spans.c.stop.is_(None))
    own = select(sessions.c.sid).where(sessions.c.sid.not_in(moved))
    return own.union(select(spans.c.log), select(leftovers.c.log))
