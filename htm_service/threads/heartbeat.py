"""How long a thread has been at what it is doing. Does not know what that is, or what too long is."""

from __future__ import annotations

import time


class Heartbeat:
    """Written by one thread, read by any: `beat` as each piece of work begins, `rest` when there is none."""

    def __init__(self) -> None:
        self._began_at: float | None = None

    def beat(self) -> None:
        """A piece of work begins."""
        self._began_at = time.monotonic()

    def rest(self) -> None:
        """Nothing is to do."""
        self._began_at = None

    @property
    def busy_s(self) -> float:
        """Seconds since the piece of work at hand began; 0 when there is none."""
        began_at = self._began_at
        return 0.0 if began_at is None else time.monotonic() - began_at
