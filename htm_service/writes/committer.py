"""The store's one writer: what waits becomes one transaction; what is on disk is then visible, and answered.

    take (the queue) -> commit -> publish: readers may see it -> deliver (the queue)

Groups are published in the order of their commits, so the tokens of a session become visible in the order of their
positions; the device thread puts them into chunks when somebody wants them, when a chunk is full, or when many
sessions were appended to together.
Does not know SQL, requests or attention.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from prometheus_client import Histogram

from htm_service.memory.resident import Extent, Forked, Resident
from htm_service.reads.worker import DeviceWorker
from htm_service.store_errors import write_failure
from htm_service.threads.batcher import LATER, Batcher, Outcome, Ticket
from storage.base import (
    Append,
    Appended,
    Block,
    DeleteSession,
    Fork,
    KeyRow,
    ModelRow,
    Quota,
    Refused,
    SessionRow,
    Store,
    StoreError,
    Truncate,
    Write,
)

FILLED_AT_ONCE = 512
"""Sessions that were appended to together and have that put into their chunks before anybody wants it: who steps many
attends to them next, and meanwhile the device has nothing to do. It takes about 6 ms.
"""


class Change(NamedTuple):
    """One write on its way to the store, and the device's half of the session that it changes, where there is one."""

    write: Write
    resident: Resident | None

    @property
    def cost(self) -> int:
        """Bytes of tokens, at least 1."""
        return max(1, len(self.write.data)) if isinstance(self.write, Append) else 1


@dataclass(frozen=True, slots=True)
class Upkeep:
    """A piece of the store's own upkeep, done by the one thread that writes; its answer is whether there is more."""

    run: Callable[[], bool]


Work = Change | Upkeep
Written = SessionRow | Forked | Appended | KeyRow | Quota | ModelRow | bool
WorkTicket = Ticket[Work, Written]


class Committer:
    """See the head of this module. `queue` is the store thread's, which is to call `run`."""

    def __init__(
        self,
        store: Store,
        queue: Batcher[Work, Written],
        device: DeviceWorker,
        clock: Callable[[], float],
        commit_seconds: Histogram,
    ) -> None:
        self.queue = queue
        self.num_appended_tokens = 0
        self.num_trimmed_tokens = 0
        self.num_truncated_tokens = 0
        self._store = store
        self._device = device
        self._clock = clock
        self._commit_seconds = commit_seconds

    async def write(self, write: Write, resident: Resident | None) -> Written:
        """One write, on disk and visible when this returns (the loop). What the store refuses is raised as it is.

        Raises DiskFull and Unavailable for what it could not do.
        """
        lane = None if resident is None else resident.sid
        change = Change(write, resident)
        return await self._done(self.queue.submit(change, cost=change.cost, lane=lane))

    async def write_all(self, changes: Sequence[Change]) -> list[Written | Exception]:
        """Writes as one entry of the queue, each on disk and visible, or not made, when this returns (the loop).

        Of each what was written, or Refused, DiskFull or Unavailable. Raises what refuses them all before they begin.
        """
        outcomes = await self.queue.submit_all([(change, change.cost) for change in changes]).future
        return [_failure(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]

    async def upkeep(self, run: Callable[[], bool]) -> bool:
        """One piece of upkeep; whether there is more (the loop). Raises DiskFull and Unavailable."""
        return bool(await self._done(self.queue.submit(Upkeep(run), lane=Upkeep)))

    async def _done(self, future: asyncio.Future[Written]) -> Written:
        try:
            return await future
        except Refused:
            raise
        except StoreError as error:
            raise write_failure(error) from error
        finally:
            del future  # it holds its error, whose traceback holds this frame

    # --- the store thread ---

    def run(self, tickets: Sequence[WorkTicket]) -> list[Outcome[Written]]:
        """Commit all changes as one group and publish it; upkeep is a batch of its own, so that no append waits for it.

        Once the group is on disk nothing may raise: its writes would be made again, one by one.
        """
        changes = [ticket.item for ticket in tickets if isinstance(ticket.item, Change)]
        if not changes:
            return [_outcome_of(ticket.item) for ticket in tickets if isinstance(ticket.item, Upkeep)]
        truncated = [change.resident for change in changes if isinstance(change.write, Truncate)]
        _begin(truncated, 1)
        try:
            with self._commit_seconds.time():
                written = iter(self._store.write([change.write for change in changes], now=self._clock()))
        except BaseException:
            _begin(truncated, -1)
            raise
        if len(changes) < len(tickets):
            self.queue.requeue([ticket for ticket in tickets if isinstance(ticket.item, Upkeep)])
        outcomes: list[Outcome[Written]] = [
            LATER if isinstance(ticket.item, Upkeep) else self._publish(ticket, next(written)) for ticket in tickets
        ]
        together = [
            change.resident
            for ticket in tickets
            if ticket.entry is not None and isinstance(change := ticket.item, Change) and change.resident is not None
        ]
        if together:
            self._device.fill_all(together[:FILLED_AT_ONCE])
        return outcomes

    def _publish(self, ticket: WorkTicket, outcome: Written | Refused) -> Outcome[Written]:
        """Let readers see what is on disk; a deletion is answered when the device has given everything back."""
        assert isinstance(ticket.item, Change)
        write, resident = ticket.item
        if resident is None or isinstance(outcome, Refused):
            if isinstance(write, Truncate):
                _begin([resident], -1)
            return outcome
        if isinstance(outcome, Appended) and isinstance(write, Append) and not outcome.replayed:
            new = Block(outcome.start, write.num_tokens, write.data, write.episode)
            self.num_appended_tokens += write.num_tokens
            self.num_trimmed_tokens += outcome.first_position - resident.extent.first_position
            if resident.publish(new, outcome.first_position):
                self._device.fill(resident)
        elif isinstance(write, Fork) and isinstance(outcome, SessionRow):
            child = Resident(
                outcome.key, outcome.sid, resident.settings, Extent(outcome.first_position, outcome.length)
            )
            resident.publish_fork(child)
            self._device.fill(resident)
            return Forked(outcome, child)
        elif isinstance(write, Truncate) and isinstance(outcome, SessionRow):
            self.num_truncated_tokens += resident.extent.length - outcome.length
            resident.publish_truncation(outcome.first_position, outcome.length)
            self._device.fill(resident)
        elif isinstance(write, DeleteSession):
            resident.is_deleted = True
            self._device.free(resident, partial(self.queue.finish, [(ticket, outcome)]))
            return LATER
        return outcome


def _failure(error: Exception) -> Exception:
    """What a write of many failed with, as `Committer.write` raises it."""
    return error if isinstance(error, Refused) or not isinstance(error, StoreError) else write_failure(error)


def _begin(truncated: Iterable[Resident | None], num: int) -> None:
    """Count truncations as begun, or as not begun after all: whoever reads the store meanwhile may read either."""
    for resident in truncated:
        if resident is not None:
            resident.num_begun += num


def _outcome_of(upkeep: Upkeep) -> bool | Exception:
    try:
        return upkeep.run()
    except Exception as error:
        return error
