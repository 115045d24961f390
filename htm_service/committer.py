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


Written = SessionRow | Appended
ChangeTicket = Ticket[Change, Written]


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
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._device = device
        self._clock = clock
        self.batcher: Batcher[Change, Written] = Batcher(
            "store", self._commit, max_waiting=max_waiting, max_cost=max_group_bytes, on_death=on_death
        )

    def _commit(self, tickets: Sequence[ChangeTicket]) -> Sequence[Outcome[Written]]:
        """Commit a group; refusals are answered now, the rest when the device has seen it."""
        outcomes = self._store.write([ticket.item.write for ticket in tickets], now=self._clock())
        answers: list[Outcome[Written]] = []
        durable: list[tuple[ChangeTicket, Written]] = []
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            if isinstance(outcome, Refused) or not isinstance(ticket.item.write, (Append, DeleteSession)):
                answers.append(outcome)
            else:
                durable.append((ticket, outcome))
                answers.append(LATER)
        if durable and not self._device.batcher.post(lambda: self._show(durable)):
            reason = self._device.batcher.unhealthy_reason or "the device thread has stopped"
            error = Unhealthy(f"written, but not visible: {reason}")
            self.batcher.finish((ticket, error) for ticket, _ in durable)
        return answers

    def _show(self, durable: list[tuple[ChangeTicket, Written]]) -> None:
        """Make a committed group visible, then answer it (device thread)."""
        for ticket, written in durable:
            change = ticket.item
            if change.session is None:
                continue
            if isinstance(change.write, DeleteSession):
                self._device.forget(change.session)
            elif isinstance(written, Appended) and not written.replayed and change.tokens is not None:
                new = NewTokens(
                    written.start,
                    change.tokens,
                    change.write.episode if isinstance(change.write, Append) else None,
                )
                self._device.make_visible(change.session, new)
        self.batcher.finish(durable)
