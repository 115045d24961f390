"""A queue with one worker thread: what waits is taken together, run as one batch, delivered in one hop.

The engine uses it twice: for the device (attends become a batch) and for the store (appends become a
transaction). There is no artificial delay: an idle worker takes the first item at once, a busy one finds
what has gathered meanwhile.

What waits is one batch where it fits into one. Where it does not, it waits in lanes, one for each session: a batch
takes from the lanes in turn, up to a cost, so that no session waits behind all of another's. Within a lane the order
is always that of admission.

An item that is admitted gets exactly one outcome: a result, an error of its own, or, when the worker dies or
is closed, an `Unavailable`. Work whose future is done before, cancelled or out of time, is not begun. A batch that
fails as a whole is run again item by item.
Items that one caller brings together are one entry: it waits as one, in a lane of its own, and has one future, which
gets the outcomes of all. Each of its items is run, put off, failed and cut off from the others as any item is.
Does not know: what the items are. Asyncio futures are touched on their loop only.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeAlias, TypeVar

from htm_service.errors import DeadlineExceeded, Draining, Overloaded, Unhealthy
from htm_service.metrics import Metrics, QueueMetrics

Item = TypeVar("Item")
Result = TypeVar("Result")


class Later(Enum):
    """The outcome of an item that waits for something: whoever brings that will `requeue` or `finish` it."""

    LATER = "later"


LATER = Later.LATER


class Entry(Generic[Result]):
    """Items that were admitted together; on their loop."""

    __slots__ = ("_left", "_outcomes", "future")

    def __init__(self, num_items: int, future: asyncio.Future[list[Result | Exception]]) -> None:
        self.future = future
        """Done when all items are."""
        self._outcomes: list[Result | Exception | None] = [None] * num_items
        self._left = num_items

    def note(self, place: int, outcome: Result | Exception) -> None:
        """What became of one item."""
        self._outcomes[place] = outcome
        self._left -= 1
        if not self._left:
            self._end(outcome)

    async def within(self, deadline: float, timeout_s: float) -> list[Result | Exception]:
        """An outcome for each item, in order: DeadlineExceeded for those that are not done at `deadline`, `timeout_s`
        after the beginning, on the loop's clock. Those that have not begun by then are skipped.
        """
        timer = asyncio.get_running_loop().call_at(deadline, lambda: self._end(_too_late(timeout_s)))
        try:
            return await self.future
        finally:
            timer.cancel()

    def _end(self, rest: Result | Exception) -> None:
        """Done: `rest` is the outcome of what has none."""
        if not self.future.done():
            self.future.set_result([rest if outcome is None else outcome for outcome in self._outcomes])


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item, Result]):
    """One admitted item on its way: its cost, at least 1, and its future."""

    item: Item
    future: asyncio.Future[Any]
    """Its own, or its entry's."""
    cost: int
    submitted_at: float
    lane: Hashable = None
    started_at: float = field(default=0.0)
    entry: Entry[Result] | None = None
    """That it is one of, and `place`, which one of it."""
    place: int = 0

    @property
    def queue_s(self) -> float:
        """Seconds between admission and the start of its batch."""
        return self.started_at - self.submitted_at


Outcome: TypeAlias = Result | Exception | Later
Run: TypeAlias = Callable[[Sequence[Ticket[Item, Result]]], Sequence[Outcome[Result]]]
Finished: TypeAlias = tuple[Ticket[Item, Result], Result | Exception]


class Batcher(Generic[Item, Result]):
    """See the head of this module. `clock` (seconds) says how long items waited."""

    def __init__(
        self,
        name: str,
        *,
        max_waiting: int,
        max_cost: int,
        clock: Callable[[], float] = time.monotonic,
        metrics: QueueMetrics | None = None,
    ) -> None:
        self.name = name
        self.max_waiting = max_waiting
        self.max_cost = max_cost
        self.num_batches = 0
        self.num_items = 0
        self.num_skipped = 0
        """Items whose caller had gone, or was told that its time is over, before their work began."""
        self.unhealthy_reason: str | None = None
        self.busy_since: float | None = None
        self._run: Run[Item, Result] | None = None
        self._after_turn: Callable[[], None] | None = None
        self._clock = clock
        self._metrics = metrics or Metrics().of_queue(name)
        self._changed = threading.Condition()
        self._new: list[Ticket[Item, Result]] = []
        """What waits and is not in a lane yet."""
        self._lanes: OrderedDict[Hashable, deque[Ticket[Item, Result]]] = OrderedDict()
        """What waits since it did not fit into a batch; the lane whose turn it is stands first."""
        self._num_waiting = 0
        self._requeued: deque[list[Ticket[Item, Result]]] = deque()
        """What waited for something that is here now."""
        self._arrived: list[Ticket[Item, Result]] = []
        """What was submitted since the loop's last turn, and as how many entries; the loop's."""
        self._num_arrived = 0
        self._actions: deque[Callable[[], None]] = deque()
        self._open: set[Ticket[Item, Result]] = set()
        self._draining = False
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- the callers' side (the loop) ---

    def start(self, run: Run[Item, Result], after_turn: Callable[[], None] | None = None) -> None:
        """Start the worker; futures will belong to the running loop.

        `run` gets the tickets of one batch and answers one outcome for each: a result, an exception, or LATER. The
        worker calls `after_turn` when it has done all that it took at once: where a ticket that was put off has come
        to its end without `run`, this is where that can be seen.
        """
        self._run, self._after_turn = run, after_turn
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=f"htm-{self.name}", daemon=True)
        self._thread.start()

    def submit(self, item: Item, *, cost: int = 1, lane: Hashable = None) -> asyncio.Future[Result]:
        """Admit an item. Raises Overloaded, Draining or Unhealthy at once when it cannot be.

        The worker learns of it at the end of the loop's turn: what arrives in one turn goes together, and the two
        threads meet once for all of it. (An idle worker that was handed the first few at once would work beside the
        loop, but on twice as many batches of half the size: appends became a fifth fewer.)
        """
        loop = self._admit()
        ticket: Ticket[Item, Result] = Ticket(item, loop.create_future(), cost, self._clock(), lane)
        self._arrived.append(ticket)
        return ticket.future

    def submit_all(self, items: Sequence[tuple[Item, int]]) -> Entry[Result]:
        """Admit items, each with its cost, as one entry. Raises as `submit` does, for all of them."""
        loop = self._admit()
        future: asyncio.Future[list[Result | Exception]] = loop.create_future()
        entry, now = Entry[Result](len(items), future), self._clock()
        self._arrived += [
            Ticket(item, future, cost, now, entry, 0.0, entry, place) for place, (item, cost) in enumerate(items)
        ]
        return entry

    def _admit(self) -> asyncio.AbstractEventLoop:
        """The loop, which hands over what arrives in this turn. Raises Overloaded, Draining or Unhealthy."""
        assert self._loop is not None, "the batcher is not started"
        if self.unhealthy_reason is not None:
            raise Unhealthy(self.unhealthy_reason)
        if self._draining:
            raise Draining("the server is stopping and takes no new work")
        if self.num_waiting >= self.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests wait for the {self.name}, the limit is {self.max_waiting}")
        if not self._arrived:
            self._loop.call_soon(self._hand_over)
        self._num_arrived += 1
        return self._loop

    def _hand_over(self) -> None:
        """Let the worker have what has arrived."""
        arrived, self._arrived = self._arrived, []
        num_arrived, self._num_arrived = self._num_arrived, 0
        with self._changed:
            self._open.update(arrived)
            if self.unhealthy_reason is None:
                self._new += arrived
                self._num_waiting += num_arrived
                self._changed.notify()
                return
        self.finish((ticket, Unhealthy(self.unhealthy_reason)) for ticket in arrived)

    async def close(self, timeout_s: float) -> None:
        """Stop admitting, let what was admitted finish, fail the rest after `timeout_s`. Safe to call twice."""
        self._hand_over()
        with self._changed:
            self._draining = True
            self._changed.notify()
        if self._thread is None:
            return
        await asyncio.to_thread(self._wait_until_drained, timeout_s)
        with self._changed:
            self._stopped = True
            rest = list(self._open)
            self._changed.notify()
        self.finish((ticket, Draining("the server stopped before this was done")) for ticket in rest)
        await asyncio.to_thread(self._thread.join, max(1.0, timeout_s))
        if self._thread.is_alive():
            logging.getLogger(__name__).error("the %s thread did not stop within %.0f s", self.name, timeout_s)

    @property
    def num_waiting(self) -> int:
        """Items and entries of many that wait for their batch."""
        return self._num_waiting + self._num_arrived

    # --- the runners' side (any thread) ---

    @property
    def is_running(self) -> bool:
        """Whether the worker will still do what is posted."""
        return not self._stopped and self.unhealthy_reason is None

    def post(self, action: Callable[[], None]) -> bool:
        """Have the worker call `action` before its next batch; actions run in the order of their posting.

        False when the worker has stopped. An action must not raise: an exception there ends the worker.
        """
        with self._changed:
            if not self.is_running:
                return False
            self._actions.append(action)
            self._changed.notify()
        return True

    def is_open(self, ticket: Ticket[Item, Result]) -> bool:
        """Whether a ticket that the worker has taken has no outcome yet."""
        return ticket in self._open

    def requeue(self, tickets: list[Ticket[Item, Result]]) -> None:
        """Tickets whose outcome was LATER are a batch of their own, before what waits: they were admitted before it."""
        with self._changed:
            if self.is_running:
                self._requeued.append(tickets)
                self._changed.notify()

    def finish(self, finished: Iterable[Finished[Item, Result]]) -> None:
        """Give tickets their outcomes, all in one hop to the loop."""
        pairs = list(finished)
        if not pairs or self._loop is None:
            return
        with self._changed:
            self._open.difference_update([ticket for ticket, _ in pairs])
            if self._draining:  # `close` waits for this, and nobody else: the worker would wake for nothing
                self._changed.notify_all()
        try:
            self._loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:
            logging.getLogger(__name__).warning(
                "%s: %d answers came after their loop was closed", self.name, len(pairs)
            )

    def fail(self, reason: str) -> None:
        """Refuse everything from now on, and fail what was admitted, with `reason`; or with an earlier one."""
        with self._changed:
            reason = self.unhealthy_reason = self.unhealthy_reason or reason
            self._new.clear()
            self._lanes.clear()
            self._requeued.clear()
            self._num_waiting = 0
            self._actions.clear()
            rest = list(self._open)
        self.finish((ticket, Unhealthy(reason)) for ticket in rest)

    # --- the worker ---

    def _work(self) -> None:
        try:
            while self._turn():
                self.busy_since = None
        except BaseException as error:
            self._die(error)

    def _turn(self) -> bool:
        """One round of work, of which nothing is held while the next is waited for; False when there is none left."""
        turn = self._take()
        if turn is None:
            return False
        actions, tickets = turn
        for action in actions:
            self.busy_since = time.monotonic()
            action()
        for requeued in self._take_requeued():  # after the actions, which may have put some back
            self._run_batch(requeued)
        if tickets:
            self._run_batch(tickets)
        if self._after_turn is not None:
            self._after_turn()
        return True

    def _take(self) -> tuple[list[Callable[[], None]], list[Ticket[Item, Result]]] | None:
        """All actions and the next batch of what waits; None when there is nothing left and never will be."""
        with self._changed:
            while not (self._actions or self._requeued or self._new or self._lanes):
                if self._stopped:
                    return None
                self._changed.wait()
            actions = list(self._actions)
            self._actions.clear()
            if self._draining and actions:
                self._changed.notify_all()  # `close` waits for them to be taken
            return actions, self._take_waiting()

    def _take_requeued(self) -> list[list[Ticket[Item, Result]]]:
        if not self._requeued:  # a glance without the lock: what comes later is the next turn's
            return []
        with self._changed:
            batches = list(self._requeued)
            self._requeued.clear()
            return batches

    def _take_waiting(self) -> list[Ticket[Item, Result]]:
        """All that waits, if it fits; else one ticket of each lane in turn, until the next would pass the cost.

        One that is dearer than a batch may be is a batch of its own. One whose future is done goes along to be
        counted: it takes neither its lane's turn nor room in the batch.
        """
        new, self._new = self._new, []
        if not self._lanes and sum([ticket.cost for ticket in new]) <= self.max_cost:
            self._num_waiting = 0
            return new
        for ticket in new:
            self._lanes.setdefault(ticket.lane, deque()).append(ticket)
        tickets: list[Ticket[Item, Result]] = []
        cost = 0
        while self._lanes:
            lane, waiting = next(iter(self._lanes.items()))
            is_done, own_cost = waiting[0].future.done(), waiting[0].cost
            if cost and not is_done and cost + own_cost > self.max_cost:
                break
            tickets.append(waiting.popleft())
            if not waiting:
                del self._lanes[lane]
            elif not is_done:
                self._lanes.move_to_end(lane)
            cost += 0 if is_done else own_cost
        self._num_waiting -= sum(not ticket.place for ticket in tickets)  # of an entry the first counts
        return tickets

    def _run_batch(self, taken: list[Ticket[Item, Result]]) -> None:
        """Run tickets as a batch, without those that nobody waits for any more, and deliver."""
        now = self._clock()
        tickets: list[Ticket[Item, Result]] = []
        finished: list[Finished[Item, Result]] = []
        for ticket in taken:
            ticket.started_at = now
            if ticket.future.done():  # cancelled, or out of time
                finished.append((ticket, DeadlineExceeded("the caller has gone")))
            else:
                tickets.append(ticket)
        num_skipped = len(finished)
        if tickets:
            self.num_batches += 1
            for ticket, outcome in zip(tickets, self._outcomes(tickets), strict=True):
                if not isinstance(outcome, Later):
                    finished.append((ticket, outcome))
            waits_s = [ticket.queue_s for ticket in tickets if not ticket.place]
            self._metrics.ran(waits_s, len(tickets), self._clock() - now)
        self.num_skipped += num_skipped
        self.num_items += len(finished) - num_skipped
        self.finish(finished)

    def _outcomes(self, tickets: list[Ticket[Item, Result]]) -> Sequence[Outcome[Result]]:
        assert self._run is not None, "the batcher is started"
        self.busy_since = time.monotonic()
        try:
            return self._run(tickets)
        except Exception as error:
            if len(tickets) == 1:
                return [error]
            logging.getLogger(__name__).warning(
                "%s: a batch of %d failed and is run item by item: %r", self.name, len(tickets), error
            )
            return [self._outcomes([ticket])[0] for ticket in tickets]

    def _die(self, error: BaseException) -> None:
        logging.getLogger(__name__).critical("the %s thread died", self.name, exc_info=error)
        reason = f"the {self.name} thread died: {error!r}"
        self.fail(reason)

    def _wait_until_drained(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: (not self._open and not self._actions) or self.unhealthy_reason is not None, timeout_s
            )


def _too_late(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"the deadline of {timeout_s * 1e3:.0f} ms passed")


def _resolve(pairs: list[Finished[Item, Result]]) -> None:
    for ticket, outcome in pairs:
        if ticket.future.done():
            continue
        if ticket.entry is not None:
            ticket.entry.note(ticket.place, outcome)
        elif isinstance(outcome, Exception):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)


async def within(future: asyncio.Future[Result], deadline: float, timeout_s: float) -> Result:
    """The future's result; DeadlineExceeded at `deadline`, `timeout_s` after the beginning, on the loop's clock.

    The work is skipped if it has not begun by then.
    """
    timer = asyncio.get_running_loop().call_at(deadline, _expire, future, timeout_s)
    try:
        return await future
    finally:
        timer.cancel()
        del future  # it holds its error, whose traceback holds this frame


def _expire(future: asyncio.Future[Any], timeout_s: float) -> None:
    if not future.done():
        future.set_exception(_too_late(timeout_s))
