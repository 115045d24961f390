"""The reading half of the contract on a SQL database, through SQLAlchemy Core: a pool of connections, a snapshot each.

Does not know which database it is (see `sqlite.py`, `postgresql.py`), who writes, nor what the settings mean.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, String, cast, select, tuple_

from storage.base import (
    FIRST_KEY,
    NO_LIMIT,
    STAGED,
    Block,
    CheckSettings,
    Damage,
    KeyRow,
    ModelRow,
    Quota,
    SessionKey,
    SessionRow,
    Store,
    StoreError,
    Summary,
    TooManyBytes,
    Totals,
    within,
)
from storage.sql import verification
from storage.sql.failures import translated
from storage.sql.namespaces.models import read_parts
from storage.sql.snapshot import Snapshot
from storage.sql.tables import sessions


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a kind of database needs besides SQL."""

    disk_bytes: Callable[[], int]
    give_back: Callable[[Connection, int], bool]
    """Return some free space to the file system, so little that nobody waits long, and leave so many bytes of it;
    True when there is more. Called outside of a transaction, raises StoreError.
    """
    erase: Callable[[Connection], bool]
    """As `Store.erase`, after something was deleted. Called outside of a transaction, raises StoreError."""
    is_lost: Callable[[Connection], bool]
    """Whether a connection that nothing was asked of for a while is known to be broken."""
    finish: Callable[[Connection], None]
    """The last thing done on the connection that writes."""
    release: Callable[[], None]
    """Called when all connections are closed, maybe again."""
    structure: Callable[[Connection], Iterable[str]]
    """What is wrong with the database itself."""
    has_committed: Callable[[str | None], bool]
    """Whether the transaction of this id, whose commit was not answered, was committed. Raises StoreError."""


class SqlReader(Store):
    """See the head of this module."""

    durable = True

    def __init__(self, url: str, readers: Engine, upkeep: Upkeep) -> None:
        self.url = url
        self._readers = readers
        self._upkeep = upkeep
        self._is_closed = False

    def get_session(self, key: SessionKey) -> SessionRow | None:
        """See `Store.get_session`."""
        with self._snapshot() as snapshot:
            return snapshot.session(key)

    def list_sessions(
        self,
        namespace: str | None = None,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: SessionKey = FIRST_KEY,
        limit: int = 100,
    ) -> list[SessionRow]:
        """See `Store.list_sessions`. SQL only leaves out what cannot have the labels: settings without their text."""
        if limit <= 0:
            return []
        wanted = (labels or {}).items()
        columns = sessions.c.namespace, sessions.c.id
        query = select(sessions).where(sessions.c.id >= prefix).order_by(*columns)
        if namespace is None:
            query = query.where(tuple_(*columns) > after, sessions.c.namespace != STAGED)
        else:  # as two conditions, so that the index serves both
            query = query.where(sessions.c.namespace == namespace, sessions.c.id > after.id)
        if (end := _end_of(prefix)) is not None:
            query = query.where(sessions.c.id < end)
        for key, value in wanted:
            text = f"{json.dumps(key)}: {json.dumps(value)}"
            query = query.where(cast(sessions.c.settings, String).contains(text, autoescape=True))
        with self._snapshot() as snapshot, contextlib.closing(snapshot.sessions(query, min(limit, 500))) as found:
            matching = (row for row in found if wanted <= row.settings.get("labels", {}).items())
            return list(itertools.islice(matching, limit))

    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """See `Store.read_blocks`. Holds one of the reading connections until it ends or is closed."""
        with self._snapshot() as snapshot:
            yield from snapshot.blocks(sid, start, stop)

    def read_ranges(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Block]]:
        """See `Store.read_ranges`."""
        with self._snapshot() as snapshot:
            for place, (sid, start, stop) in enumerate(ranges):
                for block in snapshot.blocks(sid, start, stop):
                    yield place, block

    def read_episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """See `Store.read_episodes`."""
        with self._snapshot() as snapshot:
            return snapshot.episodes(sid, stop)

    def read_summaries(self, sid: int) -> Iterator[Summary]:
        """See `Store.read_summaries`."""
        with self._snapshot() as snapshot:
            yield from snapshot.summaries(sid)

    def read_sketches(self, sid: int, version: int) -> Iterator[Summary]:
        """See `Store.read_sketches`."""
        with self._snapshot() as snapshot:
            yield from snapshot.sketches(sid, version)

    def read_payloads(self, sid: int, positions: Sequence[int], max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """See `Store.read_payloads`."""
        with self._snapshot() as snapshot, contextlib.closing(snapshot.payloads(sid, positions)) as found:
            return within(max_bytes, found)

    def read_payloads_each(
        self, wanted: Sequence[tuple[int, Sequence[int], int]]
    ) -> list[dict[int, bytes] | TooManyBytes]:
        """See `Store.read_payloads_each`."""
        outcomes: list[dict[int, bytes] | TooManyBytes] = []
        with self._snapshot() as snapshot:
            for sid, positions, max_bytes in wanted:
                with contextlib.closing(snapshot.payloads(sid, positions)) as found:
                    try:
                        outcomes.append(within(max_bytes, found))
                    except TooManyBytes as error:
                        outcomes.append(error)
        return outcomes

    def read_payload_range(self, sid: int, start: int, stop: int, max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """See `Store.read_payload_range`."""
        with self._snapshot() as snapshot, contextlib.closing(snapshot.payload_range(sid, start, stop)) as found:
            return within(max_bytes, found)

    def list_keys(self) -> list[KeyRow]:
        """See `Store.list_keys`."""
        with self._snapshot() as snapshot:
            return snapshot.keys()

    def list_models(self) -> list[ModelRow]:
        """See `Store.list_models`."""
        with self._snapshot() as snapshot:
            return snapshot.models()

    def read_model(self, row: ModelRow) -> bytes | None:
        """See `Store.read_model`."""
        with self._snapshot() as snapshot:
            return read_parts(snapshot.connection, row)

    def count_sessions(self, namespace: str, model: str | None = None) -> dict[str, int]:
        """See `Store.count_sessions`."""
        with self._snapshot() as snapshot:
            return snapshot.session_counts(namespace, model)

    def get_quota(self, namespace: str) -> Quota:
        """See `Store.get_quota`."""
        with self._snapshot() as snapshot:
            return snapshot.quota(namespace)

    def totals(self, namespace: str | None = None) -> Totals:
        """See `Store.totals`."""
        with self._snapshot() as snapshot:
            disk_bytes = self._upkeep.disk_bytes() if namespace is None else 0
            return Totals(*snapshot.sums(namespace), disk_bytes, snapshot.model_bytes(namespace))

    def verify(self, check_settings: CheckSettings = lambda settings: None) -> Iterator[Damage]:
        """See `Store.verify`; one snapshot."""
        with self._snapshot() as snapshot:
            yield from verification.problems(snapshot.connection, self._upkeep.structure, check_settings)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"the store {self.url} is closed")

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Snapshot]:
        """A snapshot on a connection of its own."""
        self._check_open()
        with translated(), self._readers.connect() as connection:
            try:
                yield Snapshot(connection)
            finally:
                if self._is_closed:  # so is the pool, which closed what it had: this one would stay open
                    connection.detach()


def _end_of(prefix: str) -> str | None:
    """The first text, by code point, after all that begin with `prefix`; None when there is none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # UTF-8 has no surrogates
