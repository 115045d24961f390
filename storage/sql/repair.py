"""What of a damaged database can be kept, and keeping just that: of each session the tokens up to the first damage.

A token after a gap has a position that nothing vouches for, so it goes as well. Nothing is changed before it is
known what will be lost. Does not repair the structure of a file: that is SQLite's, and a backup's, to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Row, String, cast, delete, select, update

from storage.base import CheckSettings, ModelRow, SessionKey
from storage.sql.failures import trouble_with
from storage.sql.namespaces.models import damage_of
from storage.sql.snapshot import Snapshot, row_of
from storage.sql.tables import blocks, idempotency, leftovers, models, payloads, sessions, sketches, spans, summaries
from storage.sql.tokens.branches import delete_branch, truncate
from storage.sql.tokens.spans import known_logs, layout_of
from storage.sql.verification import damaged_chunks, outside, stored


@dataclass(frozen=True, slots=True)
class Repair:
    """What is to be done to one session; `length` None: it goes altogether. `message` says what is lost, and why."""

    session: SessionKey
    sid: int
    length: int | None
    num_bytes: int
    message: str

    def __str__(self) -> str:
        """What is lost."""
        return f"session {self.session} loses {self.message}"


@dataclass(frozen=True, slots=True)
class LostModel:
    """A model whose bytes cannot be read: it goes, so that another may be put in its place."""

    row: ModelRow
    message: str

    def __str__(self) -> str:
        """What is lost."""
        return f"model {self.row.name!r} of namespace {self.row.namespace!r} is lost: {self.message}"


def plan(connection: Connection, check_settings: CheckSettings) -> list[Repair | LostModel]:
    """The repairs that are needed, in the order of sessions' keys, then models. Reads everything, changes nothing."""
    key = sessions.c.namespace, sessions.c.id
    columns = (*key, sessions.c.sid, sessions.c.length, sessions.c.num_bytes, sessions.c.first_position)
    settings = cast(sessions.c.settings, String).label("settings")
    rows = connection.execute(select(*columns, settings).order_by(*key)).all()
    found = (_of_session(connection, row, check_settings) for row in rows)
    needed: list[Repair | LostModel] = [repair for repair in found if repair is not None]
    for model in Snapshot(connection).models():
        if (trouble := damage_of(connection, model)) is not None:
            needed.append(LostModel(model, trouble))
    return needed


def carry_out(connection: Connection, repairs: Sequence[Repair | LostModel]) -> None:
    """Do what was planned, and delete what belongs to no session or lies outside of one."""
    for repair in repairs:
        if isinstance(repair, LostModel):
            connection.execute(delete(models).where(models.c.version == repair.row.version))
            continue
        if repair.length is None:
            delete_branch(connection, repair.sid)
            continue
        of_session = sessions.c.sid == repair.sid
        row = row_of(connection.execute(select(sessions).where(of_session)).one())
        layout = layout_of(connection, repair.sid)
        assert layout is not None, "it was found damaged"
        for table in (summaries, sketches):  # they are computed again
            connection.execute(delete(table).where(table.c.log.in_(layout.logs)))
        if repair.length < row.length:  # a repeated append must write again what is lost: its key goes too
            truncate(connection, row, repair.length, layout.chunk_size or 1)
        connection.execute(update(sessions).where(of_session).values(length=repair.length, num_bytes=repair.num_bytes))
    connection.execute(delete(spans).where(spans.c.sid.not_in(select(sessions.c.sid))))
    for table in (blocks, summaries, sketches, payloads):
        connection.execute(delete(table).where(table.c.log.not_in(known_logs())))
    known = select(sessions.c.sid).union(select(leftovers.c.log))
    connection.execute(delete(idempotency).where(idempotency.c.sid.not_in(known)))
    for sid in connection.execute(select(sessions.c.sid)).scalars().all():
        if (layout := layout_of(connection, sid)) is not None:
            connection.execute(delete(payloads).where(*outside(connection, layout)))


def _of_session(connection: Connection, row: Row[tuple[object, ...]], check_settings: CheckSettings) -> Repair | None:
    session, num_tokens = SessionKey(row.namespace, row.id), row.length - row.first_position
    if (trouble := trouble_with(row.settings, check_settings)) is not None:
        return Repair(session, row.sid, None, 0, f"all of it, {num_tokens} tokens, because {trouble}")
    length, num_bytes, why = _readable(connection, row)
    if length < row.length:
        lost = f"the tokens {length} to {row.length - 1}, {row.length - length} of {num_tokens}, because {why}"
    elif length > row.length or num_bytes != row.num_bytes:
        lost = "nothing; its record of length or bytes is put right"
    elif why_again := next(damaged_chunks(connection, row.sid), None):
        lost = f"nothing; its summaries and sketches are made again, because {why_again}"
    else:
        return None
    return Repair(session, row.sid, length, num_bytes, lost)


def _readable(connection: Connection, row: Row[tuple[object, ...]]) -> tuple[int, int, str]:
    """Up to which position a session's tokens are whole, how many bytes that is, and why no more."""
    end, num_bytes = row.first_position, 0
    for block in stored(connection, row.sid):
        if block.start != end:
            return end, num_bytes, f"those from {end} to {block.start - 1} are missing"
        if not block.is_sound:
            return end, num_bytes, f"the block at position {block.start} does not match its checksum"
        end = block.start + block.num_tokens
        num_bytes += block.num_bytes
    return end, num_bytes, f"those from {end} on are missing"
