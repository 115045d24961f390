"""Calls timed in turns, A B C A B C ..., so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

PAUSE_S = 0.01
"""Before each call: the threads that the one before left behind, torch's above all, spin for some milliseconds."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the best and the median of some, and the least processor time."""

    best_ms: float
    median_ms: float
    cpu_ms: float


def time_in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, Timing]:
    """Each call `rounds` times, after one to warm up; every round begins with another one."""
    names = list(calls)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_S)
            cpu_began, began = time.process_time(), time.perf_counter()
            calls[name]()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    return {
        name: Timing(min(wall[name][1:]) * 1e3, statistics.median(wall[name][1:]) * 1e3, min(cpu[name][1:]) * 1e3)
        for name in names
    }
