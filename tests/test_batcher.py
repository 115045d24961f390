"""The batcher with a fake function: order, batching, errors of one's own, deadlines, closing, death."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from htm_service.errors import DeadlineExceeded, Draining, Overloaded, Unhealthy
from htm_service.threads.batcher import LATER, Batcher, Outcome, Ticket

IntTicket = Ticket[int, int]
Run = Callable[[Sequence[IntTicket]], Sequence[Outcome[int]]]
Start = Callable[..., Batcher[int, int]]


class Gate:
    """A run function that doubles its items, records its batches, and waits while it is shut."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.entered = threading.Event()

    def __call__(self, tickets: Sequence[IntTicket]) -> Sequence[Outcome[int]]:
        self.entered.set()
        assert self.is_open.wait(10)
        items = [ticket.item for ticket in tickets]
        self.batches.append(items)
        if any(item < 0 for item in items):
            raise ValueError(f"{items} hold a negative item")
        return [item * 2 for item in items]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    batchers: list[Batcher[int, int]] = []

    def make(run: Run, *, max_waiting: int = 100, max_cost: int = 100, **options: Any) -> Batcher[int, int]:
        batcher = Batcher[int, int]("fake", max_waiting=max_waiting, max_cost=max_cost, **options)
        batcher.start(run)
        batchers.append(batcher)
        return batcher

    yield make
    for batcher in batchers:
        await batcher.close(1.0)


async def shut(gate: Gate, batcher: Batcher[int, int]) -> asyncio.Future[int]:
    """Occupy the worker with item 0 until the gate is opened."""
    gate.is_open.clear()
    gate.entered.clear()
    first = batcher.submit(0)
    await asyncio.to_thread(gate.entered.wait, 5)
    return first


async def test_what_waits_is_taken_together_and_in_order(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    futures = [batcher.submit(item) for item in range(1, 8)]
    gate.is_open.set()
    assert await asyncio.gather(first, *futures) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert gate.batches == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert (batcher.num_batches, batcher.num_items, batcher.num_waiting) == (2, 8, 0)


async def test_a_batch_ends_where_its_cost_would_pass_the_limit(start: Start) -> None:
    gate = Gate()
    batcher = start(gate, max_cost=10)
    first = await shut(gate, batcher)
    futures = [batcher.submit(item, cost=cost) for item, cost in [(1, 4), (2, 6), (3, 1), (4, 50), (5, 1)]]
    gate.is_open.set()
    await asyncio.gather(first, *futures)
    assert gate.batches == [[0], [1, 2], [3], [4], [5]]


async def test_a_failing_item_gets_its_own_error_and_the_next_batch_works(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    futures = [batcher.submit(item) for item in (1, -2, 3)]
    gate.is_open.set()
    results = await asyncio.gather(first, *futures, return_exceptions=True)
    assert (results[0], results[1], results[3]) == (0, 2, 6)
    assert isinstance(results[2], ValueError) and "[-2]" in str(results[2])
    assert await batcher.submit(21) == 42


async def test_more_than_the_queue_holds_is_refused(start: Start) -> None:
    gate = Gate()
    batcher = start(gate, max_waiting=2)
    first = await shut(gate, batcher)
    futures = [batcher.submit(1), batcher.submit(2)]
    with pytest.raises(Overloaded, match=r"2 requests wait .* limit is 2"):
        batcher.submit(3)
    gate.is_open.set()
    assert await asyncio.gather(first, *futures) == [0, 2, 4]


async def test_cancelled_and_late_items_are_skipped(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    gone, late, kept = batcher.submit(1), batcher.submit(2), batcher.submit(3)
    gone.cancel()
    late.set_exception(DeadlineExceeded("the deadline of 1 ms passed"))
    gate.is_open.set()
    assert await kept == 6 and await first == 0
    with pytest.raises(DeadlineExceeded, match="deadline of 1 ms"):
        await late
    assert gate.batches == [[0], [3]]
    assert batcher.num_skipped == 2


async def test_later_is_answered_by_finish(start: Start) -> None:
    parked: list[IntTicket] = []
    has_run = threading.Event()

    def park(tickets: Sequence[IntTicket]) -> Sequence[Outcome[int]]:
        parked.extend(tickets)
        has_run.set()
        return [LATER] * len(tickets)

    batcher = start(park)
    future = batcher.submit(5)
    await asyncio.to_thread(has_run.wait, 5)
    assert not future.done()
    batcher.finish([(parked[0], 55)])
    assert await future == 55


async def test_what_is_requeued_is_a_batch_of_its_own_before_all_that_waits(start: Start) -> None:
    """Also when it is an action that puts it back: what it brought is still there when its batch runs."""
    batches: list[list[int]] = []
    parked: list[IntTicket] = []
    has_parked, entered, is_open = threading.Event(), threading.Event(), threading.Event()

    def run(tickets: Sequence[IntTicket]) -> Sequence[Outcome[int]]:
        batches.append([ticket.item for ticket in tickets])
        if not parked:
            parked.extend(tickets)
            has_parked.set()
            return [LATER] * len(tickets)
        entered.set()
        assert is_open.wait(10)
        return [ticket.item * 2 for ticket in tickets]

    batcher = start(run)
    early = [batcher.submit(item) for item in (1, 2, 3)]
    await asyncio.to_thread(has_parked.wait, 5)
    holding = batcher.submit(4)
    await asyncio.to_thread(entered.wait, 5)
    late = batcher.submit(5)
    early[1].cancel()
    await asyncio.sleep(0)
    batcher.post(lambda: batcher.requeue(parked))
    is_open.set()
    assert [await future for future in (holding, early[0], early[2], late)] == [8, 2, 6, 10]
    assert batches == [[1, 2, 3], [4], [1, 3], [5]]
    assert (batcher.num_items, batcher.num_skipped, batcher.num_waiting) == (4, 1, 0)


async def test_actions_run_before_the_next_batch_in_order(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    seen: list[str] = []
    future = batcher.submit(1)
    assert batcher.post(lambda: seen.append(f"a {len(gate.batches)}"))
    assert batcher.post(lambda: seen.append(f"b {len(gate.batches)}"))
    gate.is_open.set()
    await asyncio.gather(first, future)
    assert seen == ["a 1", "b 1"]


async def test_close_finishes_what_was_admitted_and_refuses_the_rest(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    second = batcher.submit(2)
    closing = asyncio.create_task(batcher.close(5.0))
    await asyncio.sleep(0.01)
    with pytest.raises(Draining):
        batcher.submit(3)
    gate.is_open.set()
    await closing
    assert (await first, await second) == (0, 4)
    assert not batcher.post(lambda: None)
    await batcher.close(1.0)


async def test_close_waits_no_longer_than_for_what_was_posted(start: Start) -> None:
    """It waited for its whole deadline when it looked before the worker had taken an action: nobody told it then."""
    for number in range(60):
        batcher: Batcher[int, int] = start(lambda items: list(items))
        if number % 2:
            await asyncio.sleep(0.001)
        batcher.post(lambda: None)
        began = time.monotonic()
        await batcher.close(5.0)
        assert time.monotonic() - began < 4.0


async def test_close_fails_what_does_not_finish_in_time(start: Start) -> None:
    batcher = start(lambda tickets: [LATER] * len(tickets))
    never = batcher.submit(1)
    await batcher.close(0.05)
    with pytest.raises(Draining, match="before this was done"):
        await never


@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dying_worker_answers_everyone_and_says_so(start: Start) -> None:
    gate = Gate()
    batcher = start(gate)
    first = await shut(gate, batcher)
    waiting = batcher.submit(1)

    def die() -> None:
        raise RuntimeError("the device is gone")

    batcher.post(die)
    gate.is_open.set()
    assert await first == 0
    with pytest.raises(Unhealthy, match="device is gone"):
        await waiting
    with pytest.raises(Unhealthy, match="device is gone"):
        batcher.submit(2)
    assert "device is gone" in (batcher.unhealthy_reason or "")
    assert not batcher.post(lambda: None)


async def test_answers_for_a_closed_loop_are_dropped() -> None:
    gate = Gate()

    def other_loop() -> Batcher[int, int]:
        async def use() -> Batcher[int, int]:
            batcher = Batcher[int, int]("fake", max_waiting=5, max_cost=5)
            batcher.start(gate)
            gate.is_open.clear()
            batcher.submit(1)
            return batcher

        return asyncio.run(use())

    batcher = await asyncio.to_thread(other_loop)
    gate.is_open.set()
    await batcher.close(5.0)
    assert gate.batches == [[1]]


async def test_lanes_take_turns_so_that_a_long_one_delays_no_other(start: Start) -> None:
    gate = Gate()
    batcher = start(gate, max_cost=4)
    first = await shut(gate, batcher)
    futures = [batcher.submit(item, lane="long") for item in (1, 2, 3, 4, 5)]
    futures += [batcher.submit(item, lane=lane) for item, lane in ((11, "a"), (12, "b"), (13, "a"))]
    gate.is_open.set()
    await asyncio.gather(first, *futures)
    assert gate.batches == [[0], [1, 11, 12, 2], [13, 3, 4, 5]]
