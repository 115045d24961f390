"""The store's one writer: what waits becomes one transaction; what is durable is then handed to the device.

An append is answered only when it is both: on disk, then visible. The device gets groups in the order of
their commits, so the tokens of a session become visible in the order of their positions.
Does not know SQL, requests or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from htm_service.errors import Unhealthy
from htm_service.reads.worker import DeviceWorker
from htm_service.sessions.session import Session
from htm_service.threads.batcher import LATER, Batcher, Outcome, Ticket
from storage.base import Append, Appended, Block, DeleteSession, Refused, SessionRow, Store, Write


class Change(NamedTuple):
    """One write on its way to the store, and the session that it changes, where there is one."""

    write: Write
    session: Session | None


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the store's own upkeep, done by the one thread that writes; its answer is whether there is more."""

    run: Callable[[], bool]


Work = Change | Step
Written = SessionRow | Appended | bool
WorkTicket = Ticket[Work, Written]


class Committer:
    """See the head of this module."""

    def __init__(
        self,
        store: Store,
        device: DeviceWorker,
        clock: Callable[[], float],
        *,
        max_waiting: int,
        max_group_bytes: int,
        on_death: Callable[[str], None],
    ) -> None:
        self._store = store
        self._device = device
        self._clock = clock
        self.batcher: Batcher[Work, Written] = Batcher(
            "store", self._commit, max_waiting=max_waiting, max_cost=max_group_bytes, on_death=on_death
        )

    def _commit(self, tickets: Sequence[WorkTicket]) -> Sequence[Outcome[Written]]:
        """Commit a group; refusals are answered now, the rest when the device has seen it. Then upkeep.

        Once the group is on disk nothing may raise: its writes would be made again, one by one.
        """
        writes = [ticket.item.write for ticket in tickets if isinstance(ticket.item, Change)]
        outcomes = iter(self._store.write(writes, now=self._clock()) if writes else ())
        answers: list[Outcome[Written]] = [LATER] * len(tickets)
        changes: list[Change] = []
        durable: list[tuple[WorkTicket, Written]] = []
        steps: list[tuple[int, Step]] = []
        for place, ticket in enumerate(tickets):
            if isinstance(ticket.item, Step):
                steps.append((place, ticket.item))
                continue
            outcome = next(outcomes)
            if isinstance(outcome, Refused) or not isinstance(ticket.item.write, (Append, DeleteSession)):
                answers[place] = outcome
            else:
                changes.append(ticket.item)
                durable.append((ticket, outcome))
        if durable and not self._device.batcher.post(lambda: self._show(changes, durable)):
            reason = self._device.batcher.unhealthy_reason or "the device thread has stopped"
            error = Unhealthy(f"written, but not visible: {reason}")
            self.batcher.finish((ticket, error) for ticket, _ in durable)
        for place, step in steps:
            answers[place] = _outcome_of(step)
        return answers

    def _show(self, changes: Sequence[Change], durable: Sequence[tuple[WorkTicket, Written]]) -> None:
        """Make a committed group visible, then answer it (device thread)."""
        for (write, session), (_, written) in zip(changes, durable, strict=True):
            if session is None:
                continue
            if isinstance(write, DeleteSession):
                self._device.forget(session)
            elif isinstance(write, Append) and isinstance(written, Appended) and not written.replayed:
                new = Block(written.start, write.num_tokens, write.data, write.episode)
                self._device.make_visible(session, new, written.first_position)
        self.batcher.finish(durable)


def _outcome_of(step: Step) -> bool | Exception:
    try:
        return step.run()
    except Exception as error:
        return error
