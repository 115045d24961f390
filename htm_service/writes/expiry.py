"""Background: sessions past their `ttl_s` are deleted, what deleted sessions left is purged, and erased from the files.

Nobody has to ask for it, and nobody waits for it: every piece is small, and between two of them the store's thread
takes what has come meanwhile. Runs on the event loop. Does not know SQL, tokens or attention.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from htm_service.errors import HTMError
from htm_service.sessions.directory import Directory
from htm_service.writes.committer import Committer
from storage.base import Store

PAUSE_S = 0.02
"""After each piece, so that looking through a million sessions leaves the machine to others."""

ERASE_S = 5.0
"""How long what was deleted or trimmed may still be in the store's files, where no reader needs it."""


class Expiry:
    """See the head of this module."""

    def __init__(self, directory: Directory, store: Store, committer: Committer, interval_s: float) -> None:
        self._directory = directory
        self._store = store
        self._committer = committer
        self._interval_s = interval_s

    async def run(self) -> None:
        """Expire, purge and erase again and again, for ever."""
        await asyncio.gather(_every(self._interval_s, self.expire), _every(ERASE_S, self.erase))

    async def expire(self) -> None:
        """Delete what has expired, purge all deleted sessions, then give free space back."""
        async for _ in self._directory.expire():
            await asyncio.sleep(PAUSE_S)
        for piece in (self._store.purge, self._store.give_back):
            await self._all_of(piece)

    async def erase(self) -> None:
        """Have the store's files hold nothing that was deleted, trimmed or truncated; what readers need goes later."""
        await self._all_of(self._store.purge)
        await self._committer.upkeep(self._store.erase)

    async def _all_of(self, piece: Callable[[], bool]) -> None:
        is_more = True
        while is_more:
            is_more = await self._committer.upkeep(piece)
            await asyncio.sleep(PAUSE_S)

    async def purge(self, sid: int) -> None:
        """Purge one deleted session: somebody waits for it."""
        while await self._committer.upkeep(lambda: self._store.purge(sid)):
            pass


async def _every(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await work()
        except HTMError as error:
            logging.getLogger(__name__).warning("the expiry of sessions is tried again: %s", error)
        except Exception:
            logging.getLogger(__name__).exception("the expiry of sessions failed and is tried again")
