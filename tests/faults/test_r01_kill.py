"""R1: `kill -9` of a real server under load: everything acknowledged is there, whole, once, in order, and answers."""

from __future__ import annotations

import asyncio
import random
import signal
import time

from htm_client import AsyncHTMClient

from tests.faults.conftest import StartServer
from tests.faults.journal import Journal
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.served.server import Server

NUM_WRITERS = 8
LEASE_S, MAX_START_S = 1, 8.0
START_UP_SHARE = 0.2
"""Of the rounds, in which the server is also killed while it starts."""


async def test_r1_nothing_acknowledged_is_lost_by_kill_9(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    await kill_again_and_again(await asyncio.to_thread(start_server), scale.kill_rounds, tally)


async def test_r1_nothing_acknowledged_is_lost_by_kill_9_on_postgresql(
    start_server: StartServer, tally: Tally, scale: Scale, postgresql_url: str
) -> None:
    """Each server takes over from a killed one whose lease has to end first."""
    server = await asyncio.to_thread(start_server, "--store-url", postgresql_url, "--lease-seconds", str(LEASE_S))
    await kill_again_and_again(server, scale.kill_rounds_on_postgresql, tally)
    assert tally.figures["slowest_start_s"] < LEASE_S + MAX_START_S


async def kill_again_and_again(server: Server, num_rounds: int, tally: Tally) -> None:
    """Under load, and start it again each time."""
    draw = random.Random(5)
    journals = [Journal(writer) for writer in range(NUM_WRITERS)]
    starts = []
    for _ in range(num_rounds):
        async with AsyncHTMClient(server.url, retries=0) as client:
            await asyncio.gather(*(journal.check(client, tally) for journal in journals))
            writers = [asyncio.create_task(journal.write(client, draw)) for journal in journals]
            await asyncio.sleep(draw.uniform(0.05, 0.7))
            await asyncio.to_thread(server.end, signal.SIGKILL)
            await asyncio.gather(*writers)
        tally.faults += 1
        if draw.random() < START_UP_SHARE:
            await kill_while_starting(server, draw.uniform(0.0, 1.2))
            tally.faults += 1
        began = time.monotonic()
        await asyncio.to_thread(server.start)
        starts.append(time.monotonic() - began)
        tally.rounds += 1
    async with AsyncHTMClient(server.url, retries=0) as client:
        await asyncio.gather(*(journal.check(client, tally) for journal in journals))
    tally.requests = sum(journal.num_calls for journal in journals)
    tally.figures["sessions"] = sum(journal.generation + 1 for journal in journals)
    tally.figures["slowest_start_s"] = round(max(starts), 1)
    assert tally.losses == 0
    assert tally.requests > tally.rounds * NUM_WRITERS
    assert await asyncio.to_thread(server.end, signal.SIGTERM) == 0


async def kill_while_starting(server: Server, seconds: float) -> None:
    """Kill a server that has just been started, ready or not."""
    await asyncio.to_thread(server.begin)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.end, signal.SIGKILL)
