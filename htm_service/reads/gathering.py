"""Whose turn it is to read more than one read brings.

What sees very many chunks in part, or scores every token, can be answered though they are never on the device
together: it keeps what it learns of each as it comes. That is little beside the chunks and much beside all else, so
one does so at a time, and those that need a single read go past it. On the device thread.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from htm_service.threads.batcher import Batcher, Ticket


class Gathering:
    """See the head of this module. `queue` is the device thread's."""

    def __init__(self, queue: Batcher[Any, Any]) -> None:
        self._queue = queue
        self._current: Ticket[Any, Any] | None = None
        self._waiting: deque[Ticket[Any, Any]] = deque()

    def admits(self, ticket: Ticket[Any, Any]) -> bool:
        """Whether it is this ticket's turn, until it has its outcome; if not, it will be put back into the queue."""
        if self._current is None:
            self._current = ticket
        if self._current is not ticket and ticket not in self._waiting:
            self._waiting.append(ticket)
        return self._current is ticket

    def go_on(self) -> None:
        """Put the next one back into the queue, once the one before is done or nobody waits for it any more."""
        while self._current is not None and not self._queue.is_open(self._current):
            self._current = self._waiting.popleft() if self._waiting else None
            if self._current is not None:
                self._queue.requeue([self._current])
