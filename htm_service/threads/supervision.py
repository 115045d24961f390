"""Whether the engine's threads work. Once one has died or is stuck, everything is refused at once and says why.

A thread that dies says so itself. One that is stuck cannot; it is found by the time that its work takes. Nothing is
repaired here: what is acknowledged is in the store, so whoever runs the engine ends the process, and a fresh one
takes over. Does not know what the threads do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

INTERVAL_S = 0.25


class Worker(Protocol):
    """What runs in a thread of its own."""

    busy_since: float | None
    """When, by the monotonic clock, the piece of work at hand began; None when there is none."""
    unhealthy_reason: str | None
    """Why it can do no work any more, or None."""


class Supervisor:
    """See the head of this module. `workers` are what is looked at; `ways_to_fail` make others refuse, for a reason."""

    def __init__(
        self, workers: Mapping[str, Worker], ways_to_fail: Sequence[Callable[[str], None]], stuck_s: float
    ) -> None:
        self._reason: str | None = None
        self._workers = workers
        self._ways_to_fail = ways_to_fail
        self._stuck_s = stuck_s

    def fail(self, reason: str) -> None:
        """Have everything refused from now on, with the first reason given (any thread)."""
        self._reason = self._reason or reason
        for fail in self._ways_to_fail:
            fail(self._reason)

    async def run(self) -> None:
        """Look for threads that are dead or stuck, until something has failed."""
        while self._reason is None:
            await asyncio.sleep(INTERVAL_S)
            for name, worker in self._workers.items():
                if worker.unhealthy_reason is not None:
                    self.fail(worker.unhealthy_reason)
                elif (busy_s := _busy_s(worker)) > self._stuck_s:
                    logging.getLogger(__name__).critical("the %s thread is stuck", name)
                    self.fail(f"the {name} thread is stuck: it has been at one thing for {busy_s:.1f} s")


def _busy_s(worker: Worker) -> float:
    """Seconds since its piece of work began."""
    began_at = worker.busy_since
    return 0.0 if began_at is None else time.monotonic() - began_at
