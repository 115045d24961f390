"""Calls through the client, in a process of its own that holds nothing else: how many a second, for how much work.

Each task has a session of its own, `s0` on. Prints one JSON line: all calls, and the rate and the
processor milliseconds per call of those after the first few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from htm_client import AsyncHTMClient, HTMClient

KINDS: dict[str, Callable[[Any, str, Any], Any]] = {
    "append": lambda client, session, vector: client.append(session, vector),
    "attend": lambda client, session, vector: client.attend(session, vector),
    "step": lambda client, session, vector: client.step(session, vector, vector),
}
WARM_UP = 20
"""Calls of each task before anything is counted."""


class Tally:
    """What was taken since it was made."""

    def __init__(self) -> None:
        self.began, self.processor_s = time.perf_counter(), _processor_s()
        self.calls = 0

    def answer(self, tasks: int) -> dict[str, float]:
        """Of the calls that were counted, by so many tasks."""
        took, processor_s = time.perf_counter() - self.began, _processor_s() - self.processor_s
        all_calls = self.calls + tasks * WARM_UP
        return {"all_calls": all_calls, "per_s": self.calls / took, "cpu_ms": processor_s / self.calls * 1e3}


def one_after_the_other(url: str, kind: str, vector: Any, seconds: float) -> dict[str, float]:
    """The sync client."""
    with HTMClient(url) as client:
        for _ in range(WARM_UP):
            KINDS[kind](client, "s0", vector)
        tally = Tally()
        while time.perf_counter() - tally.began < seconds:
            KINDS[kind](client, "s0", vector)
            tally.calls += 1
        return tally.answer(1)


async def side_by_side(url: str, kind: str, vector: Any, seconds: float, tasks: int) -> dict[str, float]:
    """The async client."""
    async with AsyncHTMClient(url) as client:

        def call(number: int) -> Awaitable[Any]:
            awaited: Awaitable[Any] = KINDS[kind](client, f"s{number}", vector)
            return awaited

        async def warm_up(number: int) -> None:
            for _ in range(WARM_UP):
                await call(number)

        async def work(number: int) -> None:
            while time.perf_counter() - tally.began < seconds:
                await call(number)
                tally.calls += 1

        await asyncio.gather(*(warm_up(number) for number in range(tasks)))
        tally = Tally()
        await asyncio.gather(*(work(number) for number in range(tasks)))
        return tally.answer(tasks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tasks", type=int, default=0, help="of the async client; 0 for the sync one")
    options = parser.parse_args()
    vector = np.random.default_rng(0).standard_normal(options.dim).astype(np.float32)
    if options.tasks:
        work = side_by_side(options.url, options.kind, vector, options.seconds, options.tasks)
        print(json.dumps(asyncio.run(work)))
    else:
        print(json.dumps(one_after_the_other(options.url, options.kind, vector, options.seconds)))


def _processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
