"""Whether clients whose requests take long are still there; the work for one that has gone is cancelled.

One timer for all requests: one for each, which hardly ever comes to its end, took the event loop 5 us to set and to
cancel, a tenth of what a small call takes of it. Does not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

LOOK_EVERY_S = 0.1
"""A request that is there at two looks is watched from then on; to watch them all would cost more than it saves."""


class Watch:
    """The requests of one app that wait for their work. On its event loop."""

    def __init__(self) -> None:
        self._waiting: set[_Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """The work's result. It is cancelled, which skips what has not begun, once the client has gone:
        ClientDisconnect.

        To be called when the body has been read.
        """
        waiting = _Waiting(request)
        self._waiting.add(waiting)
        if self._timer is None:
            self._look_later()
        try:
            return await work
        except asyncio.CancelledError:
            if not waiting.is_gone:
                raise
            waiting.caller.uncancel()
            raise ClientDisconnect from None
        finally:
            self._waiting.discard(waiting)
            if waiting.watcher is not None:
                waiting.watcher.cancel()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._timer = None
        for waiting in self._waiting:
            waiting.look()
        if self._waiting:
            self._look_later()


class _Waiting:
    """One request, and the task that waits for its work."""

    __slots__ = ("caller", "is_gone", "request", "was_there", "watcher")

    def __init__(self, request: Request) -> None:
        caller = asyncio.current_task()
        assert caller is not None
        self.caller: asyncio.Task[Any] = caller
        self.request = request
        self.is_gone = False
        self.was_there = False
        self.watcher: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin to watch it, when this is not the first look."""
        if self.was_there and self.watcher is None:
            self.watcher = asyncio.create_task(self._wait_until_gone())
        self.was_there = True

    async def _wait_until_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self.caller.cancel()
