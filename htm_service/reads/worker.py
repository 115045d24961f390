"""The device thread's work: a batch of attends in, their results out; durable tokens made visible.

    take -> what is cold loads -> what lacks pages waits for them -> plan, read, deliver

The only code that touches sessions' memories. Does not know storage's writes, payloads or recalls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from htm_service.attention.model import Model
from htm_service.config import EngineConfig
from htm_service.errors import HTMError, OutOfMemory, SessionNotFound, Unhealthy
from htm_service.memory.cache import Residency
from htm_service.memory.chunks import Memory
from htm_service.memory.loader import Contents, Fetch, Loader, Sink
from htm_service.reads.runner import Missing, Read, Reader
from htm_service.reads.visibility import CHUNKS_AT_ONCE, Evicted, keys_of, plan_visibility
from htm_service.records import AttendRequest, AttendResult, Timing
from htm_service.sessions.session import Session
from htm_service.threads.batcher import LATER, Batcher, Outcome, Ticket
from storage.base import Block, Store


@dataclass(frozen=True, slots=True)
class Attend:
    """One checked attend on its way to the device."""

    session: Session
    model: Model
    request: AttendRequest
    top_k: int
    length: int | None = None
    """How long the session was when the attend was admitted, where it must be answered as of then."""
    known_keys: Mapping[int, Tensor] = field(default_factory=dict)
    """These keys [D], of chunks that it sees in part and whose contents are not here."""


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
        self.residency = Residency(
            device,
            config.memory_budget_bytes,
            config.host_budget_bytes,
            lambda session: self.loader.load(session),
        )
        sink = Sink(self.residency.add_keys, self.residency.add, self._end_load)
        self.loader = Loader(store, sink, self.batcher, on_death)

    def start(self) -> None:
        """Start the device thread and the loader, on the running loop."""
        self.batcher.start()
        self.loader.start()

    def run(self, tickets: Sequence[JobTicket]) -> Sequence[Outcome[Any]]:
        """Plan what is resident, park the rest, read, deliver."""
        self.residency.begin_batch()
        outcomes: list[Outcome[Any]] = [LATER] * len(tickets)
        reads: dict[int, Read] = {}
        for ticket in tickets:
            if not ticket.item.session.is_deleted:
                self.residency.want(ticket.item.session)
        for place, ticket in enumerate(tickets):
            job = ticket.item
            if job.session.is_deleted:
                outcomes[place] = _gone(job.session)
            elif job.session.state != "resident":  # or not any more: another one needed its room
                self.residency.want(job.session)
                job.session.parked.append(ticket)
            elif isinstance(job, Probe):
                outcomes[place] = job.ask(_memory(job.session))
            else:
                try:
                    reads[place] = _plan(job)
                except HTMError as error:
                    outcomes[place] = error
        for place, outcome in self._fetch_missing(tickets, reads).items():
            del reads[place]
            outcomes[place] = outcome
        started = time.monotonic()
        results = self.reader.run(list(reads.values()))
        compute_s = time.monotonic() - started
        batch_size = sum(len(read.request.queries) for read in reads.values())
        for (place, read), result in zip(reads.items(), results, strict=True):
            outcomes[place] = result
            if isinstance(result, AttendResult):
                self.residency.touch(read.memory, result.chunk_index)
                timing = Timing(tickets[place].queue_s, compute_s, 0.0, batch_size)
                outcomes[place] = AttendResult(
                    *(result.output, result.chunk_index, result.chunk_weight, result.recalled),
                    length=_length(tickets[place].item, result),
                    timing=timing,
                )
        return outcomes

    def make_visible(self, session: Session, new: Block, first_position: int) -> None:
        """Let attends see durable tokens from now on, of a session that begins at `first_position` (device thread)."""
        if session.length == 0 and session.state == "cold" and not session.is_deleted:
            self.residency.admit(session)
        self.residency.append(session, new, first_position)

    def forget(self, session: Session) -> None:
        """Drop a deleted session from device and host tier (device thread)."""
        session.is_deleted = True
        self.residency.host.forget(session)
        if session.state != "loading":
            self.residency.evict(session)

    def _end_load(self, session: Session, error: HTMError | None) -> None:
        """Run at once what waited for a session's loading: the next load might evict it again."""
        error = self.residency.end_load(session, error)
        parked: list[JobTicket] = session.parked
        session.parked = []
        if error is not None:
            self.batcher.finish((ticket, error) for ticket in parked)
        elif parked:
            self.batcher.run_now(parked)

    # --- pages that are not here ---

    def _fetch_missing(self, tickets: Sequence[JobTicket], reads: Mapping[int, Read]) -> dict[int, Outcome[Any]]:
        """Begin to fetch what reads need and is not here; the outcomes of these: LATER, or why it cannot be."""
        late = {place: read for place, read in reads.items() if read.memory.num_missing}
        outcomes: dict[int, Outcome[Any]] = {}
        lot: list[tuple[JobTicket, Read, Missing]] = []
        num_pages = 0
        for (place, read), missing in zip(late.items(), self.reader.missing(list(late.values())), strict=True):
            limit = self.residency.max_fetch(read.memory)
            if not missing.chunks:
                continue
            outcomes[place] = LATER
            if missing.in_part:  # its keys only, by and by
                missing = missing._replace(chunks=missing.chunks[:limit])
            elif len(missing.chunks) > limit:
                outcomes[place] = OutOfMemory(
                    f"the attend takes {len(missing.chunks)} chunks at once that are not on the device, "
                    f"its budget has room for {limit}"
                )
                continue
            if num_pages + len(missing.chunks) > limit:
                self._fetch(lot)
                lot, num_pages = [], 0
            lot.append((tickets[place], read, missing))
            num_pages += len(missing.chunks)
        self._fetch(lot)
        return outcomes

    def _fetch(self, lot: list[tuple[JobTicket, Read, Missing]]) -> None:
        """Fetch chunks for all of these at once, those that the host tier has not from the store; then run them."""
        chunks: dict[Session, list[int]] = {}
        for ticket, _, missing in lot:
            wanted = chunks.setdefault(ticket.item.session, [])
            wanted.extend(sorted(set(missing.chunks).difference(wanted)))
        if not chunks:
            return
        held = self.residency.host.hold(chunks)
        rest = {session: [chunk for chunk in some if chunk not in held[session]] for session, some in chunks.items()}
        if from_store := {session: some for session, some in rest.items() if some}:
            self.loader.fetch(Fetch(from_store, lambda contents, errors: self._resume(lot, held, contents, errors)))
        else:
            self.batcher.post(lambda: self._resume(lot, held, {}, {}))

    def _resume(
        self,
        lot: list[tuple[JobTicket, Read, Missing]],
        held: Mapping[Session, Set[int]],
        contents: Contents,
        errors: Mapping[Session, HTMError],
    ) -> None:
        """Put fetched chunks where they belong and run who waited (device thread; must not raise)."""
        ready: list[JobTicket] = []
        with self.residency.lot():
            for ticket, read, missing in lot:
                session = ticket.item.session
                error = _gone(session) if session.is_deleted else errors.get(session)
                if error is None:
                    try:
                        for found in self._found(session, missing, contents, held):
                            if found and missing.in_part:
                                ticket.item = _with_keys(ticket.item, read, found)
                            elif found:
                                self.residency.put(session, found)
                    except HTMError as reason:
                        error = reason
                    except Exception as reason:
                        logging.getLogger(__name__).exception("session %s: chunks could not be put back", session.id)
                        error = Unhealthy(f"session {session.id!r}: chunks could not be put back: {reason!r}")
                if error is None:
                    ready.append(ticket)
                else:
                    self.batcher.finish([(ticket, error)])
            self.residency.host.release(held)
            if ready:
                self.batcher.run_now(ready)

    def _found(
        self, session: Session, missing: Missing, contents: Contents, held: Mapping[Session, Set[int]]
    ) -> Iterator[Mapping[int, Tensor]]:
        """What was fetched of the missing chunks, then what the host tier has; without what was evicted meanwhile."""
        stored = contents.get(session, {})
        yield {chunk: stored[chunk] for chunk in missing.chunks if chunk in stored}
        here = sorted(held[session] & set(missing.chunks))
        for first in range(0, len(here), CHUNKS_AT_ONCE):
            yield self.residency.host.read(session, here[first : first + CHUNKS_AT_ONCE])


def _plan(job: Attend) -> Read:
    memory, settings = _memory(job.session), job.session.settings
    if job.length is not None and job.length == job.request.stop == memory.first_position > 0:
        raise Evicted(f"the session's tokens before {job.length}, its length until then, were evicted")
    visibility = plan_visibility(
        job.request,
        length=memory.length,
        first_position=memory.first_position,
        chunk_size=settings.chunk_size,
        num_queries=len(job.request.queries),
        open_chunk=settings.open_chunk,
        episodes=job.session.episodes,
    )
    return Read(memory, job.model, job.request, visibility, job.top_k, job.known_keys)


def _with_keys(job: Job, read: Read, contents: Mapping[int, Tensor]) -> Attend:
    """The attend with the keys of more chunks that it sees in part; from now on its length is the planned one."""
    assert isinstance(job, Attend)
    chunks = torch.tensor(list(contents))
    slots = read.visibility.slots(chunks, read.memory.chunk_size)
    tokens = torch.stack(list(contents.values()))
    keys = keys_of(tokens, slots.to(tokens.device))
    length = read.memory.length if job.length is None else job.length
    stop = length if job.request.stop is None else job.request.stop
    known = {**job.known_keys, **dict(zip(contents, keys, strict=True))}
    return replace(job, request=replace(job.request, stop=stop), length=length, known_keys=known)


def _length(job: Job, result: AttendResult) -> int:
    return result.length if isinstance(job, Probe) or job.length is None else job.length


def _memory(session: Session) -> Memory:
    assert session.memory is not None, "a resident session has a memory"
    return session.memory


def _gone(session: Session) -> SessionNotFound:
    return SessionNotFound(f"there is no session {session.id!r}")
