"""The store's one writer: what waits becomes one transaction; what is durable is then handed to the device.

An append is answered only when it is both: on disk, then visible. The device gets groups in the order of
their commits, so the tokens of a session become visible in the order of their positions.
Does not know SQL, requests or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from htm_service.batcher import LATER, Batcher, Outcome, Ticket
from htm_service.device_worker import DeviceWorker
from htm_service.errors import Unhealthy
from htm_service.session import NewTokens, Session
from storage.base import Append, Appended, DeleteSession, Refused, SessionRow, Store, Write


@dataclass(frozen=True, slots=True)
class Change:
    """One write on its way to the store; an append brings its tokens [T, D] for the device."""

    write: Write
    session: Session | None
    tokens: Tensor | None = None


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
        changes = [(ticket, ticket.item) for ticket in tickets if isinstance(ticket.item, Change)]
        outcomes = iter(
            self._store.write([change.write for _, change in changes], now=self._clock()) if changes else ()
        )
        answers: list[Outcome[Written]] = [LATER] * len(tickets)
        durable: list[tuple[WorkTicket, Change, Written]] = []
        for place, ticket in enumerate(tickets):
            if isinstance(ticket.item, Step):
                continue
            outcome = next(outcomes)
            if isinstance(outcome, Refused) or not isinstance(ticket.item.write, (Append, DeleteSession)):
                answers[place] = outcome
            else:
                durable.append((ticket, ticket.item, outcome))
        if durable and not self._device.batcher.post(lambda: self._show(durable)):
            reason = self._device.batcher.unhealthy_reason or "the device thread has stopped"
            error = Unhealthy(f"written, but not visible: {reason}")
            self.batcher.finish((ticket, error) for ticket, _, _ in durable)
        for place, ticket in enumerate(tickets):
            if isinstance(ticket.item, Step):
                answers[place] = _outcome_of(ticket.item)
        return answers

    def _show(self, durable: list[tuple[WorkTicket, Change, Written]]) -> None:
        """Make a committed group visible, then answer it (device thread)."""
        for _, change, written in durable:
            if change.session is None:
                continue
            if isinstance(change.write, DeleteSession):
                self._device.forget(change.session)
            elif isinstance(written, Appended) and not written.replayed and change.tokens is not None:
                new = NewTokens(
                    written.start,
                    change.tokens,
                    change.write.episode if isinstance(change.write, Append) else None,
                    written.first_position,
                )
                self._device.make_visible(change.session, new)
        self.batcher.finish((ticket, written) for ticket, _, written in durable)


def _outcome_of(step: Step) -> bool | Exception:
    try:
        return step.run()
    except Exception as error:
        return error
