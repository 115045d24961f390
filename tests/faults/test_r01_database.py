"""R1: PostgreSQL is killed under load and comes back: the server says 503 meanwhile, or ends, and loses nothing."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from htm_client import AsyncHTMClient, ServerUnavailable

from api.serving import EXIT_UNHEALTHY
from bench import cluster
from tests.faults.conftest import StartServer
from tests.faults.journal import Journal
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.wire import Answer, ask
from tests.served.server import Server

NUM_WRITERS, MAX_RECOVERY_S = 8, 20.0


async def test_r1_nothing_acknowledged_is_lost_by_a_crash_of_postgresql(
    start_server: StartServer, tally: Tally, scale: Scale, postgresql_programs: Path
) -> None:
    draw = random.Random(6)
    journals = [Journal(writer) for writer in range(NUM_WRITERS)]
    recoveries = []
    with cluster.made(postgresql_programs) as database:
        url = database.url.replace("://", "+psycopg://")
        server = await asyncio.to_thread(start_server, "--store-url", url, "--lease-seconds", "2")
        for _ in range(scale.database_crashes):
            async with AsyncHTMClient(server.url, retries=0) as client:
                writers = [asyncio.create_task(write_until_refused(journal, client, draw)) for journal in journals]
                await asyncio.sleep(draw.uniform(0.3, 0.9))
                assert not any(writer.done() for writer in writers)
                database.kill()
                assert (await until(server, 503))["code"] == "unhealthy"
                await asyncio.to_thread(database.start)
                began = time.monotonic()
                assert set(await asyncio.gather(*writers)) == {"unhealthy"}
                await until(server, 200)
                recoveries.append(time.monotonic() - began)
            tally.rounds += 1
            tally.faults += 1
            async with AsyncHTMClient(server.url, retries=5) as client:  # connections of before are still found broken
                await asyncio.gather(*(journal.check(client, tally) for journal in journals))
        server.close()  # before its database goes
    tally.requests = sum(journal.num_calls for journal in journals)
    tally.figures["slowest_recovery_s"] = round(max(recoveries), 2)
    assert tally.losses == 0
    assert tally.requests > tally.rounds * NUM_WRITERS
    assert max(recoveries) < MAX_RECOVERY_S


async def write_until_refused(journal: Journal, client: AsyncHTMClient, draw: random.Random) -> str:
    """Call until the server cannot; the code with which it says so. Whether that call was done is not known."""
    while True:
        try:
            await journal.call(client, draw)
        except ServerUnavailable as refused:
            return refused.code


async def until(server: Server, status: int) -> dict[str, str]:
    """Ask what needs the database until it is answered so; the answer.

    A server that cannot know whether its last group was written ends, and is started again.
    """
    deadline = time.monotonic() + MAX_RECOVERY_S
    while True:
        try:
            answer = await ask(server.port, "GET", "/v1/sessions?limit=1")
        except ConnectionError:
            answer = Answer(0)
        if answer.status == status:
            return dict(answer.json)
        if answer.status == 0:
            assert await asyncio.to_thread(server.wait) == EXIT_UNHEALTHY
            await asyncio.to_thread(server.start)
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.05)
