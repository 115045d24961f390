"""The contract on a SQL database, through SQLAlchemy Core: one connection writes, within a transaction per group.

Does not know which database it is (see `sqlite.py`, `postgresql.py`), nor what the settings mean. The reading half
is `reader.py`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage.base import CheckSettings, StoreDamaged, StoreError, StoreFenced, Write, WriteResult
from storage.sql import repair
from storage.sql.failures import translated
from storage.sql.namespaces.models import add_part, purge_parts
from storage.sql.namespaces.quotas import Usages
from storage.sql.ownership import Ownership
from storage.sql.reader import SqlReader, Upkeep
from storage.sql.repair import LostModel, Repair
from storage.sql.tokens.deletion import purge_more
from storage.sql.write_group import Tally, WriteGroup

T = TypeVar("T")

KEPT_FREE_BYTES = 8 << 20
"""Free space that a running server keeps in the file, because the next appends will want it."""
CLOSE_SECONDS = 0.5
"""How long closing may give free space back; the rest waits for the next start."""


class SqlStore(SqlReader):
    """See the head of this module. Without `writer` and `ownership` it is for reading only."""

    def __init__(
        self, url: str, writer: Engine | None, readers: Engine, upkeep: Upkeep, ownership: Ownership | None
    ) -> None:
        super().__init__(url, readers, upkeep)
        self._writer_engine = writer
        self._ownership = ownership
        self._writer: Connection | None = None
        self._tallies: dict[int, Tally] = {}
        """What the connection that writes has found out about sessions; dropped with it."""
        self._usages = Usages()
        """And about namespaces that have quotas."""
        self._has_deleted = True
        """Whether the files may hold what was deleted. Before this process, something may have been."""
        self._write_lock = threading.Lock()

    def write(self, writes: Sequence[Write], *, now: float) -> list[WriteResult]:
        """See `Store.write`."""

        def work(connection: Connection) -> list[WriteResult]:
            group = WriteGroup(connection, writes, now, self._tallies, self._usages)
            results = group.run()
            self._has_deleted |= group.has_deleted
            return results

        return self._transact(work)

    def purge(self, sid: int | None = None) -> bool:
        """See `Store.purge`."""
        is_more = self._transact(lambda connection: purge_more(connection, sid))
        self._has_deleted |= is_more is not None
        return bool(is_more)

    def add_model_part(self, version: int, number: int, data: bytes) -> None:
        """See `Store.add_model_part`."""
        self._transact(lambda connection: add_part(connection, version, number, data))

    def purge_models(self, unfinished: Collection[int] = ()) -> bool:
        """See `Store.purge_models`."""
        is_more = self._transact(lambda connection: purge_parts(connection, unfinished))
        self._has_deleted |= is_more is not None
        return bool(is_more)

    def give_back(self) -> bool:
        """See `Store.give_back`."""
        with self._writing() as (connection, _):
            return self._upkeep.give_back(connection, KEPT_FREE_BYTES)

    def erase(self) -> bool:
        """See `Store.erase`."""
        if self._has_deleted:
            with self._writing() as (connection, _):
                self._has_deleted = not self._upkeep.erase(connection)
        return not self._has_deleted

    def watch(self, on_fenced: Callable[[str], None]) -> None:
        """See `Store.watch`."""
        if self._ownership is not None:
            self._ownership.watch(on_fenced)

    def plan_repair(self, check_settings: CheckSettings = lambda settings: None) -> list[Repair | LostModel]:
        """What can be kept of what is damaged; one snapshot. Raises StoreDamaged when the file itself is."""
        with self._snapshot() as snapshot:
            for message in self._upkeep.structure(snapshot.connection):
                raise StoreDamaged(f"the database itself is damaged: {message}; a backup may help")
            return repair.plan(snapshot.connection, check_settings)

    def carry_out_repair(self, repairs: Sequence[Repair | LostModel]) -> None:
        """Do what was planned, in one transaction, then delete what was left. No server may use the store."""
        self._transact(lambda connection: repair.carry_out(connection, repairs))
        self._tallies.clear()
        self._usages.known.clear()
        self._has_deleted = True
        for purge in (self.purge, self.purge_models):
            while purge():
                pass
        self.erase()

    def close(self) -> None:
        """Give free space back for a moment, end the connections, release the rest."""
        with self._write_lock:
            self._is_closed = True
            self._readers.dispose()  # before the writer's: SQLite folds its log in when the last one closes
            if self._writer is not None:
                deadline = time.monotonic() + CLOSE_SECONDS
                with contextlib.suppress(StoreError), translated():
                    if self._has_deleted:
                        self._upkeep.erase(self._writer)
                    while self._upkeep.give_back(self._writer, 0) and time.monotonic() < deadline:
                        pass
                    self._upkeep.finish(self._writer)
                self._drop_writer()
            if self._ownership is not None:
                self._ownership.release()
            if self._writer_engine is not None:
                self._writer_engine.dispose()
            self._upkeep.release()

    def _was_committed(self, transaction: str | None) -> bool:
        """Whether a commit that raised was one. Not to know is the end: memory and store would part."""
        try:
            return self._upkeep.has_committed(transaction)
        except StoreError as error:
            assert self._ownership is not None
            reason = f"whether the last group was written cannot be known: {error}"
            self._ownership.fence(reason)
            raise StoreFenced(reason) from error

    def _transact(self, work: Callable[[Connection], T]) -> T:
        """One transaction, by the owner only; what `work` answers, once it is known to be committed."""
        with self._writing() as (connection, ownership):
            results: list[T] = []
            transaction: str | None = None
            try:
                with connection.begin():
                    transaction = ownership.check(connection)
                    results.append(work(connection))
            except StoreFenced as error:
                ownership.fence(str(error))
                raise
            except DBAPIError:
                if not results:
                    raise
                self._drop_writer()
                if not self._was_committed(transaction):
                    raise
            return results[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Connection, Ownership]]:
        """The connection that writes. Whatever state a failure left it in, the next one gets a fresh one."""
        with self._write_lock, translated():
            self._check_open()
            if self._writer_engine is None or self._ownership is None:
                raise StoreError(f"the store {self.url} was opened for reading only")
            if self._writer is not None and self._upkeep.is_lost(self._writer):
                self._drop_writer()
            if self._writer is None:
                self._writer = self._writer_engine.connect()
            try:
                yield self._writer, self._ownership
            except BaseException:
                self._drop_writer()
                raise

    def _drop_writer(self) -> None:
        self._tallies.clear()
        self._usages.known.clear()
        if self._writer is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._writer.close()
            self._writer = None
