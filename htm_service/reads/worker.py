"""The device thread's work: plan a batch, run it, deliver; what lacks something waits for it and comes back.

    take (the queue) -> plan: cold sessions load, missing pages are fetched -> run -> deliver
                          ^------- back into the queue when they are here ----'

Only this thread touches sessions' chunks. Does not know storage's writes, payloads or recalls.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from htm_service.attention.registry import ModelRegistry
from htm_service.errors import HTMError, OutOfMemory, SessionNotFound
from htm_service.kernels.base import Kernel
from htm_service.memory.cache import Cache
from htm_service.memory.chunks import Chunks
from htm_service.memory.loader import Fetch, Loader
from htm_service.memory.resident import Resident
from htm_service.memory.sketches.table import SketchTable
from htm_service.reads.gathering import Gathering
from htm_service.reads.runner import Attend, Missing, Runner
from htm_service.reads.search.finder import Find, Finder
from htm_service.reads.visibility import Parts, Trimmed, Truncated, ends_of, plan_visibility
from htm_service.records import AttendResult, Ints, SearchResult, SelectResult, Timing
from htm_service.threads.batcher import LATER, Batcher, Entry, Outcome, Ticket

T = TypeVar("T")
U = TypeVar("U")

READ_BYTES = 64 << 20
"""Contents that are read in one go for those that can use them by and by."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a session's chunks, for inspection."""

    resident: Resident
    ask: Callable[[Chunks], Any]


Job = Attend | Probe
JobTicket = Ticket[Job, Any]


class DeviceWorker:
    """See the head of this module. `queue` is the device thread's, which is to call `run`."""

    def __init__(
        self, queue: Batcher[Job, Any], cache: Cache, loader: Loader, runner: Runner, models: ModelRegistry
    ) -> None:
        self.models = models
        self.queue = queue
        self.cache = cache
        self.loader = loader
        self.runner = runner
        self.finder = Finder(runner.kernel)
        self.gathering = Gathering(queue)
        self._sketching: set[Resident] = set()
        """Whose next sketches are made after the batch at hand."""

    def submit(self, attend: Attend, cost: int) -> asyncio.Future[AttendResult | SelectResult | SearchResult]:
        """Admit an attend, a select or a search (the loop). Raises Overloaded, Draining or Unhealthy."""
        return self.queue.submit(attend, cost=cost + attend.planned_products, lane=attend.resident.sid)

    def submit_all(self, attends: Sequence[tuple[Attend, int]]) -> Entry[AttendResult | SelectResult | SearchResult]:
        """Admit attends, each with its cost, as one entry (the loop). Raises as `submit` does."""
        return self.queue.submit_all([(attend, cost + attend.planned_products) for attend, cost in attends])

    async def ask(self, resident: Resident, question: Callable[[Chunks], T]) -> T:
        """What the device thread answers about the chunks of a session that is resident then (the loop)."""
        answer: T = await self.queue.submit(Probe(resident, question), lane=resident.sid)
        return answer

    def fill(self, resident: Resident) -> None:
        """Have what was appended put into the chunks before the next batch (any thread)."""
        self.queue.post(partial(self.cache.fill, resident))

    def fill_all(self, residents: Sequence[Resident]) -> None:
        """The same for several."""
        self.queue.post(partial(self.cache.fill_all, residents))

    def free(self, resident: Resident, then: Callable[[], None]) -> None:
        """Have what a deleted session holds given back before the next batch, and `then` told (any thread)."""

        def act() -> None:
            self.cache.free(resident)
            then()

        if not self.queue.post(act):  # it holds nothing any more that anybody could take
            then()

    def have_kept(self, table: SketchTable, first: int, last: int) -> None:
        """Note that the store has the sketches of the chunks first .. last-1 (any thread)."""
        self.queue.post(partial(table.have_kept, first, last))

    def use(self, kernel: Kernel) -> None:
        """Have the batches after the one at hand computed with another kernel (any thread)."""

        def act() -> None:
            self.runner.kernel = kernel
            self.finder.use(kernel)

        self.queue.post(act)

    # --- the device thread ---

    def run(self, tickets: Sequence[JobTicket]) -> list[Outcome[Any]]:
        """One outcome for each ticket: a result or an error, LATER for what comes back."""
        outcomes: dict[JobTicket, Outcome[Any]] = {}
        ready = self._fetch_missing(self._plan(tickets, outcomes), outcomes)
        started = time.monotonic()
        results = self._apart([attend for _, attend in ready], self.runner.run, self.finder.run)
        self._deliver(ready, results, time.monotonic() - started, outcomes)
        return [outcomes[ticket] for ticket in tickets]

    def _apart(
        self,
        jobs: Sequence[Attend],
        attends: Callable[[Sequence[Attend]], Sequence[T]],
        finds: Callable[[Sequence[Find]], Sequence[U]],
    ) -> list[T | U]:
        """What becomes of attends and selects, and of searches, each kind together; in the order of the jobs."""
        searches = [job for job in jobs if isinstance(job, Find)]
        if not searches:  # nearly always
            return list(attends(jobs))
        others = [job for job in jobs if not isinstance(job, Find)]
        found, attended = iter(finds(searches)), iter(attends(others))
        return [next(found) if isinstance(job, Find) else next(attended) for job in jobs]

    def _plan(
        self, tickets: Sequence[JobTicket], outcomes: dict[JobTicket, Outcome[Any]]
    ) -> list[tuple[JobTicket, Attend]]:
        """The attends that are planned, the others' outcomes."""
        self.cache.begin_turn()
        served = self.models.served  # of this moment, for the whole batch
        for ticket in tickets:
            self._want(ticket.item.resident)
        for ticket in tickets:
            try:
                self._use_fetched(ticket.item)
            except HTMError as error:
                outcomes[ticket] = error
        ready: list[tuple[JobTicket, Attend]] = []
        too_many: list[JobTicket] = []
        cost = 0
        for ticket in tickets:
            job, resident = ticket.item, ticket.item.resident
            if resident.is_deleted:
                outcomes[ticket] = SessionNotFound(f"there is no session {resident.id!r}")
            elif ticket in outcomes:
                continue
            elif resident.state != "resident":  # or not any more: another one needed its room
                self._want(resident)
                resident.parked.append(ticket)
                outcomes[ticket] = LATER
            elif isinstance(job, Probe):
                outcomes[ticket] = job.ask(resident.held)
            elif isinstance(job, Find) and not self._has_sketches(resident):
                resident.parked.append(ticket)
                outcomes[ticket] = LATER
            elif ready and cost + _cost_of(ticket) > self.queue.max_cost:
                too_many.append(ticket)
                outcomes[ticket] = LATER
            else:
                cost += _cost_of(ticket)
                try:
                    job.weights.bind(served)
                    _see(job)
                except HTMError as error:
                    outcomes[ticket] = error
                else:
                    ready.append((ticket, job))
                    if isinstance(job, Find):
                        self._want_sketches(resident)
        if too_many:  # what waited for one session comes together, however much it is
            self.queue.requeue(too_many)
        return ready

    def _has_sketches(self, resident: Resident) -> bool:
        """Have room for sketches of what is searched; whether those that are stored are here, or else being read."""
        if (table := self.cache.begin_sketches(resident)) is not None:
            self.loader.load_sketches(resident, table)
        table = resident.held.sketches
        return table is None or table.is_read

    def _want_sketches(self, resident: Resident) -> None:
        """Have what lacks of the sketches made, by one for all that search."""
        if resident not in self._sketching:
            self._sketch(resident)

    def _sketch(self, resident: Resident) -> None:
        """Make some sketches, so many at a time that others can wait for them."""
        self._sketching.discard(resident)
        if self.cache.sketch(resident):
            self._sketching.add(resident)
            self.queue.post(partial(self._sketch, resident))

    def _want(self, resident: Resident) -> None:
        """Have a session's tokens here; when it is cold, its loading begins."""
        if not resident.is_deleted and not self.cache.want(resident) and resident.state == "cold":
            self.cache.begin_load(resident)
            self.loader.load(resident)

    def _fetch_missing(
        self, planned: list[tuple[JobTicket, Attend]], outcomes: dict[JobTicket, Outcome[Any]]
    ) -> list[tuple[JobTicket, Attend]]:
        """The attends that have all they need; for the others, fetch what is not here, so much at a time as fits."""
        late = [(ticket, attend) for ticket, attend in planned if attend.chunks.num_missing]
        if not late:
            return planned
        fetch, num_pages = Fetch({}, []), 0
        for (ticket, attend), missing in zip(late, self._missing([attend for _, attend in late]), strict=True):
            if not missing.chunks:
                continue
            limit = self.cache.max_fetch(attend.resident)
            if missing.in_part or isinstance(attend, Find):  # by and by; meanwhile the session may grow
                attend.see_as_of(attend.chunks.length)
                at_once = max(1, min(limit, READ_BYTES // attend.chunks.arena.page_bytes))
                if len(missing.chunks) > at_once and not self.gathering.admits(ticket):
                    attend.visibility, outcomes[ticket] = None, LATER  # it is planned anew
                    continue
                missing = missing._replace(chunks=missing.chunks[:at_once])
            elif len(missing.chunks) > limit:
                outcomes[ticket] = OutOfMemory(
                    f"the attend takes {len(missing.chunks)} chunks at once that are not on the device, "
                    f"its budget has room for {limit}"
                )
                continue
            if num_pages and num_pages + len(missing.chunks) > limit:
                self.loader.fetch(fetch)
                fetch, num_pages = Fetch({}, []), 0
            fetch.add(attend.resident, missing.chunks, ticket)
            num_pages += len(missing.chunks)
            attend.fetch, attend.missing = fetch, missing
            outcomes[ticket] = LATER
        if fetch.tickets:
            self.loader.fetch(fetch)
        return [(ticket, attend) for ticket, attend in planned if ticket not in outcomes]

    def _missing(self, jobs: Sequence[Attend]) -> list[Missing]:
        return self._apart(jobs, self.runner.missing, self.finder.missing)

    def _use_fetched(self, job: Job) -> None:
        """Put what was fetched where it belongs; what was trimmed meanwhile is not among it. Raises HTMError."""
        if isinstance(job, Probe) or job.fetch is None or job.missing is None:
            return
        attend, resident, fetch, missing = job, job.resident, job.fetch, job.missing
        attend.fetch = attend.missing = None
        if not resident.holds(fetch.num_seen[resident]):
            return  # truncated since: what lacks now is looked for again
        if resident in fetch.errors:
            raise fetch.errors[resident]
        stored = fetch.contents.get(resident, {})
        found = {chunk: stored[chunk] for chunk in missing.chunks if chunk in stored}
        if not found:
            return
        if isinstance(attend, Find):
            if resident.state == "resident":  # else it loads again, and what it takes is looked for again
                self.cache.sketch_contents(resident, found)
                self.finder.know(attend, found)
                if not missing.in_part:
                    with contextlib.suppress(OutOfMemory):  # what is wanted of them is known
                        self.cache.put(resident, found)
        elif missing.in_part:
            _know_keys(attend, found)
        elif resident.state == "resident":
            self.cache.put(resident, found)

    def _deliver(
        self,
        ready: list[tuple[JobTicket, Attend]],
        results: Sequence[AttendResult | SelectResult | SearchResult | Exception],
        compute_s: float,
        outcomes: dict[JobTicket, Outcome[Any]],
    ) -> None:
        """The results with their timings as outcomes; what they took counts as used now."""
        batch_size = sum(len(attend.request.queries) for _, attend in ready)
        for (ticket, attend), result in zip(ready, results, strict=True):
            if isinstance(result, AttendResult | SelectResult | SearchResult):
                self.cache.touch(attend.resident, _chunks_of(result))
                length = result.length if attend.length is None else attend.length
                timing = Timing(ticket.queue_s, compute_s, 0.0, batch_size)
                result = result._replace(length=length, timing=timing, num_truncated=attend.num_truncated)
                if isinstance(result, AttendResult):
                    result = result._replace(model_hash=attend.model.hash, top_k=attend.top_k)
            outcomes[ticket] = result


def _chunks_of(result: AttendResult | SelectResult | SearchResult) -> Ints:
    """The chunks that were taken, -1 for none."""
    return result.position // result.chunk_size if isinstance(result, SearchResult) else result.chunk_index


def _cost_of(ticket: JobTicket) -> int:
    """What a ticket costs, now that its session's episodes are known."""
    job = ticket.item
    if isinstance(job, Probe) or job.request.episodes is None:
        return ticket.cost
    return max(ticket.cost, job.planned_products)


def _see(attend: Attend) -> None:
    """Plan what an attend sees of the session as it is now. Raises InvalidArgument, Trimmed, Truncated."""
    chunks, settings = attend.chunks, attend.resident.settings
    if attend.num_truncated != attend.resident.num_seen:
        if attend.length is not None:
            raise Truncated(f"the session was truncated since its length was {attend.length}")
        attend.begin_anew(attend.resident.num_seen)
    if attend.length is not None and attend.length == attend.request.stop == chunks.first_position > 0:
        raise Trimmed(f"the session's tokens before {attend.length}, its length until then, were trimmed")
    attend.visibility = plan_visibility(
        attend.request,
        length=chunks.length,
        first_position=chunks.first_position,
        chunk_size=settings.chunk_size,
        num_queries=len(attend.request.queries),
        open_chunk=settings.open_chunk,
        episodes=attend.resident.episodes,
    )


def _know_keys(attend: Attend, contents: Mapping[int, Tensor]) -> None:
    """Know the keys of more chunks that it, or a query of it, sees in part."""
    chunks, size = torch.tensor(list(contents)), attend.resident.settings.chunk_size
    tokens, seen = torch.stack(list(contents.values())), attend.seen
    attend.known_keys.add(seen.parts(chunks, size, seen.slots(chunks, size)), tokens)
    if (ends := ends_of(seen, size, attend.resident.extent.length, chunks.device)) is not None:
        parts = ends.parts()
        place_of = {chunk: place for place, chunk in enumerate(contents)}
        places = torch.tensor([place_of.get(chunk, -1) for chunk in parts.chunks.tolist()], dtype=torch.int64)
        if (is_here := places >= 0).any():
            attend.known_keys.add(Parts(*(one[is_here] for one in parts)), tokens[places[is_here]])
