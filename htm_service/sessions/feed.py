"""What happens to sessions, told as it happens to whoever reads along; bounded for each reader, free when nobody does.

A reader that does not keep up loses the oldest events and is told how many. Runs on the event loop.
Does not know HTTP, and what the events are good for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from htm_service.errors import Overloaded
from htm_service.records import Event

EVENTS_KEPT = 128
"""Events that wait for one reader."""
MAX_READERS = 64
"""Of one namespace, so that no other's are turned away."""


class Feed:
    """See the head of this module."""

    def __init__(self) -> None:
        self.catch_up: Callable[[], None] = lambda: None
        """Tells the recalls that are not told yet, which happened before whatever else is told."""
        self._readers: dict[str, set[Reader]] = {}
        """By namespace, of those that have some."""

    @property
    def is_read(self) -> bool:
        """Whether anybody reads along: nobody needs to make an event otherwise."""
        return bool(self._readers)

    @property
    def num_readers(self) -> int:
        """How many read along."""
        return sum(map(len, self._readers.values()))

    def tell(self, event: Event) -> None:
        """Tell all readers of the event's namespace."""
        if event.kind != "recall":
            self.catch_up()
        for reader in self._readers.get(event.key.namespace, ()):
            reader.tell(event)

    def read(self, namespace: str, session_id: str | None) -> Reader:
        """A reader, to be closed, of what happens from now on to one session of a namespace, or to all of them.

        Raises Overloaded.
        """
        others = self._readers.get(namespace, set())
        if len(others) >= MAX_READERS:
            raise Overloaded(f"{len(others)} read the events, the limit is {MAX_READERS}")
        reader = Reader(self, namespace, session_id)
        self._readers[namespace] = others | {reader}
        return reader

    def drop(self, reader: Reader) -> None:
        """Tell this one no more."""
        if left := self._readers.pop(reader.namespace, set()) - {reader}:
            self._readers[reader.namespace] = left


class Reader:
    """One who reads along: what has come since it last took, of one session of a namespace or of all of them."""

    def __init__(self, feed: Feed, namespace: str, session_id: str | None) -> None:
        self.namespace = namespace
        self._feed = feed
        self._session_id = session_id
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._num_dropped = 0
        self._has_come = asyncio.Event()

    def tell(self, event: Event) -> None:
        """Keep an event of its namespace until it is taken, or until too many others have come."""
        if self._session_id not in (None, event.key.id):
            return
        self._num_dropped += len(self._events) == EVENTS_KEPT
        self._events.append(event)
        self._has_come.set()

    async def take(self, timeout_s: float) -> tuple[list[Event], int]:
        """What has come, oldest first, and how many were dropped before it; nothing after `timeout_s` without any."""
        try:
            async with asyncio.timeout(timeout_s):  # Python 3.11's `wait_for` may swallow a cancellation
                await self._has_come.wait()
        except TimeoutError:
            return [], 0
        self._has_come.clear()
        events, num_dropped = list(self._events), self._num_dropped
        self._events.clear()
        self._num_dropped = 0
        return events, num_dropped

    def close(self) -> None:
        """Read no more. Safe to call twice."""
        self._feed.drop(self)
