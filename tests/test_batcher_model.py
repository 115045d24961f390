"""A model of the queue: the batcher with a fake clock and a fake kernel, in seeded random schedules.

The schedule submits, cancels, lets time pass and lets the batch at hand end. The model knows by itself who waits, and
judges each batch as it begins. Deadlines are the engine's own, on an event loop whose time is the fake clock's.
"""

from __future__ import annotations

import asyncio
import queue
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pytest

from htm_service.errors import DeadlineExceeded
from htm_service.threads.batcher import Batcher, Outcome, Ticket, within

NUM_STEPS, MAX_COST, NUM_LANES = 80, 20, 4
ENTER_S = 5.0
"""Real seconds that an idle worker may take to begin; any is too many where something waits."""


class Clock:
    """Seconds, which pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Loop(asyncio.SelectorEventLoop):
    """An event loop on a fake clock: its timers are due when that says so."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def time(self) -> float:
        return self.clock()


@dataclass(slots=True, eq=False)
class Job:
    """What the model knows of one item."""

    number: int
    lane: Hashable
    cost: int
    submitted_at: float
    deadline: float
    is_poison: bool
    task: asyncio.Task[int]
    is_cancelled: bool = False
    began_at: float | None = None


class Kernel:
    """Doubles its items; holds each batch until it is let go; fails as a whole on poison."""

    def __init__(self) -> None:
        self.entered: queue.SimpleQueue[list[tuple[int, float]]] = queue.SimpleQueue()
        self.let_go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.poison: set[int] = set()
        self.runs: dict[int, int] = {}
        self._again: set[int] = set()

    def __call__(self, tickets: Sequence[Ticket[int, int]]) -> Sequence[Outcome[int]]:
        numbers = [ticket.item for ticket in tickets]
        if len(numbers) == 1 and numbers[0] in self._again:
            self._again.discard(numbers[0])
        else:
            self.entered.put([(ticket.item, ticket.queue_s) for ticket in tickets])
            self.let_go.get(timeout=30)
            self._again.update(numbers if len(numbers) > 1 and self.poison & set(numbers) else ())
        if self.poison & set(numbers):
            raise ValueError(f"poison in {numbers}")
        for number in numbers:
            self.runs[number] = self.runs.get(number, 0) + 1
        return [2 * number for number in numbers]


class Model:
    """Who waits, in which order, and what a batch of them must be."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.clock = Clock()
        self.kernel = Kernel()
        self.batcher: Batcher[int, int] = Batcher("model", max_waiting=1000, max_cost=MAX_COST, clock=self.clock)
        self.jobs: list[Job] = []
        self.running: list[Job] = []
        self.passed: dict[Hashable, set[Hashable]] = {}
        """Of each lane that waits, the lanes that were served since it began to, or was served itself."""

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.began_at is None and not self.is_over(job)]

    def is_over(self, job: Job) -> bool:
        return job.is_cancelled or job.deadline <= self.clock.now

    async def play(self) -> None:
        self.batcher.start(self.kernel)
        steps = (self.submit, self.cancel, self.pass_time, self.end_batch)
        for _ in range(NUM_STEPS):
            step = self.draw.choices(steps, weights=(5, 1, 2, 2))[0]
            await step()
            for _ in range(4):  # timers, cancellations and what was submitted take effect
                await asyncio.sleep(0)
            await self.observe()
        while self.running:
            await self.end_batch()
            await self.observe()
        assert not self.waiting
        await self.batcher.close(5.0)
        await self.judge_outcomes()

    async def submit(self) -> None:
        for _ in range(self.draw.choice([1, 1, 2, 6])):
            number, lane = len(self.jobs), self.draw.randrange(NUM_LANES)
            cost = self.draw.choice([1, 2, 5, 9, MAX_COST, MAX_COST + 7])
            timeout_s = self.draw.choice([3.0, 10.0, 1e6])
            deadline = self.clock.now + timeout_s
            future = self.batcher.submit(number, cost=cost, lane=lane)
            task = asyncio.create_task(within(future, deadline, timeout_s))
            is_poison = self.draw.random() < 0.1
            self.kernel.poison.update([number] if is_poison else ())
            self.jobs.append(Job(number, lane, cost, self.clock.now, deadline, is_poison, task))

    async def cancel(self) -> None:
        if alive := [job for job in self.jobs if not job.task.done()]:
            job = self.draw.choice(alive)
            job.is_cancelled = True
            job.task.cancel()

    async def pass_time(self) -> None:
        self.clock.now += self.draw.choice([0.5, 1.0, 4.0])

    async def end_batch(self) -> None:
        if self.running:
            ended, self.running = self.running, []
            self.kernel.let_go.put(None)
            await asyncio.wait([job.task for job in ended])

    async def observe(self) -> None:
        """While anything waits the worker is at a batch: if none is known to run, one begins now, and is judged."""
        waiting = self.waiting
        for lane in set(self.passed) - {job.lane for job in waiting}:
            del self.passed[lane]
        for job in waiting:
            self.passed.setdefault(job.lane, set())
        if waiting and not self.running:
            batch = await asyncio.to_thread(self.kernel.entered.get, timeout=ENTER_S)
            self.judge_batch([(self.jobs[number], queue_s) for number, queue_s in batch], waiting)
        assert self.kernel.entered.empty()

    def judge_batch(self, batch: list[tuple[Job, float]], waiting: list[Job]) -> None:
        self.running = [job for job, _ in batch]
        left = {job.lane for job in waiting if job not in self.running}  # among those that go together no turn is taken
        for job, queue_s in batch:
            assert job in waiting, f"{job} was run, and is over or was run before"
            first = next(other for other in waiting if other.lane == job.lane)
            assert job is first, f"{job} was run before {first}"
            assert queue_s == self.clock.now - job.submitted_at
            job.began_at = self.clock.now
            waiting.remove(job)
            for lane in left - {job.lane}:
                assert job.lane not in self.passed[lane], f"lane {job.lane} was served twice while {lane} waited"
                self.passed[lane].add(job.lane)
            self.passed[job.lane] = set()
        cost = sum(job.cost for job in self.running)
        assert len(batch) == 1 or cost <= MAX_COST
        heads = {job.lane: job for job in reversed(waiting)}.values()
        assert not heads or any(cost + head.cost > MAX_COST for head in heads), "there was room for those who wait"

    async def judge_outcomes(self) -> None:
        """Each has one, and its own."""
        outcomes = await asyncio.gather(*(job.task for job in self.jobs), return_exceptions=True)
        for job, outcome in zip(self.jobs, outcomes, strict=True):
            if isinstance(outcome, DeadlineExceeded):
                assert job.deadline <= self.clock.now
            elif isinstance(outcome, asyncio.CancelledError):
                assert job.is_cancelled
            elif job.is_poison:
                assert isinstance(outcome, ValueError) and str(outcome) == f"poison in [{job.number}]"
            else:
                assert outcome == 2 * job.number
            has_run = job.began_at is not None and not job.is_poison
            assert self.kernel.runs.get(job.number, 0) == has_run
        num_begun = sum(job.began_at is not None for job in self.jobs)
        assert (self.batcher.num_items, self.batcher.num_skipped) == (num_begun, len(self.jobs) - num_begun)


@pytest.mark.parametrize("seed", range(30))
def test_any_schedule_is_fair_and_wastes_nothing(seed: int) -> None:
    """Nothing waits while the worker is idle, lanes take turns, who is over is not begun, each has one outcome."""
    model = Model(seed)
    with asyncio.Runner(loop_factory=lambda: Loop(model.clock)) as runner:
        runner.run(model.play())
