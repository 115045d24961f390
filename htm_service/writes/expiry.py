"""Background: sessions past their `ttl_s` are deleted, and what deleted sessions leave behind is cleared away.

Nobody has to ask for it, and nobody waits for it: every step is small, and between two of them the store's thread
takes what has come meanwhile. Runs on the event loop. Does not know SQL, tokens or attention.
"""

from __future__ import annotations

import asyncio
import logging

from htm_service.errors import DiskFull, HTMError, Unhealthy
from htm_service.sessions.directory import Directory
from htm_service.writes.committer import Committer, Step
from storage.base import Store, StoreError, StoreFull

PAUSE_S = 0.02
"""After each step, so that looking through a million sessions leaves the machine to others."""


class Sweeper:
    """See the head of this module."""

    def __init__(self, directory: Directory, store: Store, committer: Committer, interval_s: float) -> None:
        self._directory = directory
        self._store = store
        self._committer = committer
        self._interval_s = interval_s

    async def run(self) -> None:
        """Sweep again and again, for ever."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.sweep()
            except HTMError as error:
                logging.getLogger(__name__).warning("the sweep of expired sessions is tried again: %s", error)
            except Exception:
                logging.getLogger(__name__).exception("the sweep of expired sessions failed and is tried again")

    async def sweep(self) -> None:
        """Delete what has expired, then the bytes of all deleted sessions, then give free space back."""
        async for _ in self._directory.expire():
            await asyncio.sleep(PAUSE_S)
        for step in (self._store.purge, self._store.give_back):
            is_more = True
            while is_more:
                is_more = await self._do(Step(step))
                await asyncio.sleep(PAUSE_S)

    async def purge(self, sid: int) -> None:
        """Delete the bytes of one deleted session: somebody waits for it."""
        while await self._do(Step(lambda: self._store.purge(sid))):
            pass

    async def _do(self, step: Step) -> bool:
        try:
            return bool(await self._committer.batcher.submit(step, lane=self))
        except StoreFull as error:
            raise DiskFull(str(error)) from None
        except StoreError as error:
            raise Unhealthy(f"the store failed: {error}") from error
