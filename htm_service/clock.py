"""The time of day that no step of the machine's clock changes: all stored times and idle times of a process are by it.

Does not know what it is asked for.
"""

from __future__ import annotations

import time


class SteadyClock:
    """Seconds since the epoch: what the machine's clock said when this was made, and what has passed since then.

    Time that the machine was suspended has passed, where the system counts it (Linux does).
    """

    def __init__(self) -> None:
        self._counter = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._began_at = time.time() - time.clock_gettime(self._counter)

    def __call__(self) -> float:
        """The time now; never less than before."""
        return self._began_at + time.clock_gettime(self._counter)
