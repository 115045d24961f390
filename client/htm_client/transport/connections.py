"""Connections that wait for their next request, and when they are too old for one.

Belongs to one process, and to one event loop where there is one: who was forked makes another. Does not know what
kind of connection it keeps.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from typing import Generic, Protocol, TypeVar

MAX_IDLE_S = 30.0
"""Well below what the server keeps a silent connection for, so that no request meets its end on the way."""
MAX_IDLE_CONNECTIONS = 256


class Connection(Protocol):
    """What is kept."""

    def is_usable(self) -> bool:
        """Whether nothing came over it since the last answer, not even its end."""

    def close(self) -> None:
        """Close it at once. Safe to call twice."""


C = TypeVar("C", bound=Connection)


class IdleConnections(Generic[C]):
    """The last one that came is the first to go, so that those that are not needed grow old."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[float, C]] = deque()
        self._is_closed = False

    def take(self) -> C | None:
        """One that can be used, if there is one. Raises RuntimeError after `close`."""
        while True:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the client is closed")
                if not self._waiting:
                    return None
                since, connection = self._waiting.pop()
            if time.monotonic() - since < MAX_IDLE_S and connection.is_usable():
                return connection
            connection.close()

    def put(self, connection: C) -> None:
        """Keep one whose answer was read whole; closes those that have waited too long."""
        now = time.monotonic()
        surplus: list[C] = []
        with self._lock:
            self._waiting.append((now, connection))
            while self._waiting and self._has_surplus(now):
                surplus.append(self._waiting.popleft()[1])
        for old in surplus:
            old.close()

    def close(self) -> None:
        """Close all of them, and at once those that are put back later. Safe to call twice."""
        with self._lock:
            self._is_closed = True
        self.forget()

    def forget(self) -> None:
        """Close all of them, without the lock: in a fork, the thread that holds it is not there."""
        while self._waiting:
            self._waiting.popleft()[1].close()

    def _has_surplus(self, now: float) -> bool:
        is_old = now - self._waiting[0][0] >= MAX_IDLE_S
        return self._is_closed or is_old or len(self._waiting) > MAX_IDLE_CONNECTIONS


def is_readable(connected: socket.socket) -> bool:
    """Whether there is something to read, or the end; does not wait."""
    if not hasattr(select, "poll"):  # Windows, whose `select` takes any number
        return bool(select.select([connected], [], [], 0)[0])
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))
