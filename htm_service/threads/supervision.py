"""Whether the engine's threads work. Once one has died or is stuck, everything is refused at once and says why.

A dying thread says so itself, by `fail`. One that is stuck cannot; it is found by its heartbeat. Nothing is
repaired here: what is acknowledged is in the store, so whoever runs the engine ends the process, and a fresh one
takes over. Does not know what the threads do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from htm_service.threads.batcher import Batcher
from htm_service.threads.heartbeat import Heartbeat

INTERVAL_S = 0.25


class Supervisor:
    """See the head of this module. `heartbeats` are the threads' by name; `batchers` are what is made to refuse."""

    def __init__(
        self, heartbeats: Mapping[str, Heartbeat], batchers: Sequence[Batcher[Any, Any]], stuck_s: float
    ) -> None:
        self._reason: str | None = None
        self._heartbeats = heartbeats
        self._batchers = batchers
        self._stuck_s = stuck_s

    def fail(self, reason: str) -> None:
        """Refuse everything from now on, and answer those who wait, with the first reason given (any thread)."""
        self._reason = self._reason or reason
        for batcher in self._batchers:
            batcher.fail(self._reason)

    async def run(self) -> None:
        """Look for threads that are stuck, until something has failed."""
        while self._reason is None:
            await asyncio.sleep(INTERVAL_S)
            for name, heartbeat in self._heartbeats.items():
                if (busy_s := heartbeat.busy_s) > self._stuck_s:
                    logging.getLogger(__name__).critical("the %s thread is stuck", name)
                    self.fail(f"the {name} thread is stuck: it has been at one thing for {busy_s:.1f} s")
                    break
