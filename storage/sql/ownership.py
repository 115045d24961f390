"""Who may write: a row with an owner, a growing epoch and a lease; its epoch is compared in every transaction.

The store enforces it, not who calls it: a process that was paused and overtaken meets another epoch within the
very transaction in which it would write. The lease says when an owner that says nothing may be overtaken; where
a lock of the operating system says that, there is no lease. Times are the database's clock, seconds since the epoch;
because a clock may be stepped, they say nothing for certain: an owner is dead when it was watched and renewed nothing.
Does not know what is written, nor which database it is.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Float,
    String,
    bindparam,
    literal_column,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from storage.base import StoreFenced
from storage.sql.prepared import Prepared
from storage.sql.tables import owners

DATA_SET = "all"
"""One row today; many servers on one database would each own some of the sessions."""
RENEWALS_PER_LEASE = 3

_OF_DATA = select(owners).where(owners.c.data_set == bindparam("data_set", DATA_SET))


@dataclass(frozen=True, slots=True)
class Holder:
    """Another owner, which did not give its lease of `lease_s` seconds back.

    The lease lasts until `expires_at`, which is in `remaining_s` seconds: both by the clock. Equal is one that has
    renewed nothing.
    """

    owner: str
    epoch: int
    expires_at: float
    lease_s: float = field(compare=False)
    remaining_s: float = field(compare=False)

    @property
    def watch_s(self) -> float:
        """For how long it must have renewed nothing to count as dead: until the lease ends, which is not sooner than
        half a lease from now, time for a renewal, nor later than a lease, whatever the clock says.
        """
        return min(max(self.remaining_s, self.lease_s / 2), self.lease_s)

    def __str__(self) -> str:
        return f"{self.owner}, whose lease ends at {_time(self.expires_at)}"


class Ownership:
    """See the head of this module. `lease_s` None means no lease.

    In SQL: `clock`, the database's clock; `transaction`, the id of the present transaction as text, where there is one.
    """

    def __init__(self, engine: Engine, clock: str, lease_s: float | None = None, transaction: str = "NULL") -> None:
        self._engine = engine
        columns = owners.c.epoch, owners.c.owner, owners.c.since, literal_column(transaction, String)
        present = _OF_DATA.with_only_columns(*columns).with_for_update(read=True, key_share=True)
        self._present = Prepared(present, "data_set")
        self._clock: ColumnElement[float] = literal_column(clock, Float)
        self._lease_s = lease_s
        self._epoch = 0
        self._fenced: str | None = None
        self._on_fenced: Callable[[str], None] = lambda reason: None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._renewal: threading.Thread | None = None

    def holder(self, connection: Connection) -> Holder | None:
        """Who holds the data by a lease that was not given back, or None. In a database of an older version, too."""
        columns: list[ColumnElement[Any]] = [literal_column("*"), self._clock.label("now")]
        query = select(*columns).select_from(owners).where(owners.c.data_set == DATA_SET)
        row = connection.execute(query).mappings().one()
        if row["expires_at"] is None:
            return None
        lease_s = row.get("lease_s") or self._lease_s or 0.0
        return Holder(row["owner"], row["epoch"], row["expires_at"], lease_s, row["expires_at"] - row["now"])

    def take(self, connection: Connection) -> None:
        """Become the owner when the transaction commits, whoever it was; waits for what that one is writing."""
        connection.execute(_OF_DATA.with_for_update())
        values = {
            "owner": f"process {os.getpid()} on {platform.node()}",
            "epoch": owners.c.epoch + 1,
            "since": self._clock,
            "expires_at": None if self._lease_s is None else self._clock + self._lease_s,
            "lease_s": self._lease_s,
        }
        taken = update(owners).where(owners.c.data_set == DATA_SET).values(values).returning(owners.c.epoch)
        self._epoch = connection.execute(taken).scalar_one()

    def keep(self) -> None:
        """Renew the lease from now on, in a thread of its own."""
        if self._lease_s is not None:
            self._renewal = threading.Thread(target=self._renew_on, args=[self._lease_s], name="htm-lease", daemon=True)
            self._renewal.start()

    def check(self, connection: Connection) -> str | None:
        """Raise StoreFenced unless this is the owner, and stay it until the transaction ends; the transaction's id.

        A renewal does not wait for the lock that this takes, a takeover does.
        """
        if self._fenced is not None:
            raise StoreFenced(self._fenced)
        transaction: str | None
        epoch, owner, since, transaction = self._present.first(connection, (DATA_SET,))
        if epoch != self._epoch:
            reason = f"another server owns this data since {_time(since)}: {owner}"
            self.fence(reason)
            raise StoreFenced(reason)
        return transaction

    def fence(self, reason: str) -> None:
        """Refuse every further write, and say so to whoever watches."""
        with self._lock:
            if self._fenced is not None:
                return
            self._fenced = reason
            on_fenced = self._on_fenced
        on_fenced(reason)

    def watch(self, on_fenced: Callable[[str], None]) -> None:
        """See `Store.watch`."""
        with self._lock:
            self._on_fenced = on_fenced
            reason = self._fenced
        if reason is not None:
            on_fenced(reason)

    def release(self) -> None:
        """End the lease at once, so that the next owner need not wait. Safe to call twice."""
        self._released.set()
        if self._renewal is not None:
            self._renewal.join()
            self._renewal = None
            self._set_lease(None)

    def _renew_on(self, lease_s: float) -> None:
        while not self._released.wait(lease_s / RENEWALS_PER_LEASE):
            self._set_lease(self._clock + lease_s)

    def _set_lease(self, expires_at: ColumnElement[float] | None) -> None:
        """A failure is tried again with the next renewal; by then the lease may have ended, which loses no data."""
        ours = (owners.c.data_set == DATA_SET, owners.c.epoch == self._epoch)
        try:
            with self._engine.begin() as connection:
                if connection.execute(update(owners).where(*ours).values(expires_at=expires_at)).rowcount == 0:
                    self.check(connection)
        except StoreFenced:
            self._released.set()
        except SQLAlchemyError as error:
            logging.getLogger(__name__).warning("the lease on the data could not be renewed: %s", error)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="milliseconds").replace("+00:00", " UTC")
