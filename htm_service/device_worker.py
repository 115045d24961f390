"""The device thread's work: a batch of attends in, their results out; durable tokens made visible.

The only code that touches sessions' memories. Does not know storage's writes, payloads or recalls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from htm_service.batcher import LATER, Batcher, Outcome, Ticket
from htm_service.config import EngineConfig
from htm_service.errors import HTMError, SessionNotFound
from htm_service.memory import Memory
from htm_service.models import Model
from htm_service.reader import Read, Reader
from htm_service.records import AttendRequest, AttendResult, Timing
from htm_service.residency import Residency
from htm_service.session import NewTokens, Session
from htm_service.visibility import plan_visibility
from storage.base import Store


@dataclass(frozen=True, slots=True)
class Attend:
    """One checked attend on its way to the device."""

    session: Session
    model: Model
    request: AttendRequest
    top_k: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a session's resident memory, for inspection."""

    session: Session
    ask: Callable[[Memory], Any]


Job = Attend | Probe
JobTicket = Ticket[Job, Any]


class DeviceWorker:
    """See the head of this module."""

    def __init__(
        self,
        reader: Reader,
        store: Store,
        device: torch.device,
        config: EngineConfig,
        on_death: Callable[[str], None],
    ) -> None:
        self.reader = reader
        self.batcher: Batcher[Job, Any] = Batcher(
            "device", self.run, max_waiting=config.max_waiting, max_cost=config.max_batch_products, on_death=on_death
        )
        self.residency = Residency(store, device, config.memory_budget_bytes, self.batcher, self.answer_parked)

    def run(self, tickets: Sequence[JobTicket]) -> Sequence[Outcome[Any]]:
        """Take what is resident, park the rest, plan, read, deliver."""
        outcomes: list[Outcome[Any]] = [LATER] * len(tickets)
        reads: list[Read] = []
        places: list[int] = []
        for place, ticket in enumerate(tickets):
            job = ticket.item
            if job.session.is_deleted:
                outcomes[place] = _gone(job.session)
            elif not self.residency.want(job.session):
                job.session.parked.append(ticket)
            elif isinstance(job, Probe):
                outcomes[place] = job.ask(_memory(job.session))
            else:
                try:
                    reads.append(_plan(job))
                    places.append(place)
                except HTMError as error:
                    outcomes[place] = error
        started = time.monotonic()
        results = self.reader.run(reads)
        compute_s = time.monotonic() - started
        batch_size = sum(len(read.request.queries) for read in reads)
        for place, result in zip(places, results, strict=True):
            if isinstance(result, AttendResult):
                timing = Timing(tickets[place].queue_s, compute_s, 0.0, batch_size)
                outcomes[place] = replace(result, timing=timing)
            else:
                outcomes[place] = result
        return outcomes

    def make_visible(self, session: Session, new: NewTokens) -> None:
        """Let attends see durable tokens from now on (device thread)."""
        if session.state == "cold" and session.length == 0 and not session.is_deleted:
            self.residency.admit(session)
        self.residency.append(session, new)

    def forget(self, session: Session) -> None:
        """Drop a deleted session from the device (device thread)."""
        session.is_deleted = True
        if session.state != "loading":
            self.residency.evict(session)

    def answer_parked(self, session: Session, error: HTMError | None) -> None:
        """Run at once what waited for a session's loading: the next load might evict it again (device thread)."""
        parked: list[JobTicket] = session.parked
        session.parked = []
        if error is not None:
            self.batcher.finish((ticket, error) for ticket in parked)
            return
        if parked:
            self.batcher.run_now(parked)


def _plan(job: Attend) -> Read:
    memory, settings = _memory(job.session), job.session.settings
    visibility = plan_visibility(
        job.request,
        length=memory.length,
        chunk_size=settings.chunk_size,
        num_queries=len(job.request.queries),
        open_chunk=settings.open_chunk,
        episodes=job.session.episodes,
    )
    return Read(memory, job.model, job.request, visibility, job.top_k)


def _memory(session: Session) -> Memory:
    assert session.memory is not None, "a resident session has a memory"
    return session.memory


def _gone(session: Session) -> SessionNotFound:
    return SessionNotFound(f"there is no session {session.id!r}")
