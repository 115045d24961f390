"""R11: SIGTERM under load: /readyz fails first, everyone is answered, all that was acknowledged is there afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import numpy as np
from htm_client import AsyncHTMClient, ServerUnavailable

from api.serving import EXIT_UNHEALTHY, STOP_MARGIN_S
from tests.faults.conftest import StartServer
from tests.faults.journal import Journal
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.wire import ask, make_session, send_append

NUM_WRITERS, MAX_EXIT_S = 16, 10.0
TOKENS = np.random.default_rng(11).standard_normal((40, 7)).astype(np.float32)


async def test_r11_a_stop_under_load_loses_nothing(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server)
    draw = random.Random(11)
    journals = [Journal(writer) for writer in range(NUM_WRITERS)]
    exits = []
    for _ in range(scale.drains):
        async with AsyncHTMClient(server.url, retries=0) as client:
            ready = asyncio.create_task(until_not_ready(server.port))
            writers = [asyncio.create_task(write_until_refused(journal, client, draw)) for journal in journals]
            num_calls = sum(journal.num_calls for journal in journals)
            for _ in range(3_000):  # until all are at it
                if sum(journal.num_calls for journal in journals) > num_calls + 20 * NUM_WRITERS:
                    break
                await asyncio.sleep(0.01)
            began = time.monotonic()
            code = await asyncio.to_thread(server.end, signal.SIGTERM)
            exits.append(time.monotonic() - began)
            refusals = await asyncio.gather(*writers)  # ConnectionFailed here: a request that nobody answered
            not_ready_at = await ready
        assert code == 0
        assert set(refusals) == {"draining"}
        assert not_ready_at - began < 0.5, "/readyz says so at once, long before nobody is listened to"
        tally.rounds += 1
        tally.faults += 1
        await asyncio.to_thread(server.start)
        async with AsyncHTMClient(server.url) as client:
            await asyncio.gather(*(journal.check(client, tally) for journal in journals))
    tally.requests = sum(journal.num_calls for journal in journals)
    tally.figures["slowest_exit_s"] = round(max(exits), 2)
    assert tally.losses == 0
    assert max(exits) < MAX_EXIT_S


async def test_r11_a_stop_ends_though_a_write_hangs(start_server: StartServer, tally: Tally) -> None:
    """Bug: a store thread that hung in a write made SIGTERM hang, until Docker killed the container."""
    drain_s = 0.5
    options = ("--drain-seconds", str(drain_s))
    server = await asyncio.to_thread(start_server, *options, program="tests.faults.faulty_server")
    await make_session(server.port, "s", TOKENS)
    assert (await ask(server.port, "POST", "/faults/shut/store")).status == 200
    hanging = await send_append(server.port, "s", TOKENS)
    assert (await ask(server.port, "POST", "/faults/inside/store")).status == 200
    began = time.monotonic()
    code = await asyncio.to_thread(server.end, signal.SIGTERM)
    exit_s = time.monotonic() - began
    answer = await hanging.answer()
    tally.rounds, tally.faults, tally.requests = 1, 1, 3
    tally.figures["exit_s"] = round(exit_s, 2)
    assert code == EXIT_UNHEALTHY
    assert drain_s + STOP_MARGIN_S <= exit_s < drain_s + STOP_MARGIN_S + 2
    assert answer.status != 200
    await asyncio.to_thread(server.start)
    async with AsyncHTMClient(server.url) as client:
        tally.losses = len(TOKENS) - (await client.session("s")).length
    assert tally.losses == 0


async def write_until_refused(journal: Journal, client: AsyncHTMClient, draw: random.Random) -> str:
    """Call until the server says that it stops; the code with which it says so. Who is refused has changed nothing."""
    while True:
        try:
            await journal.call(client, draw)
        except ServerUnavailable as refused:
            journal.pending = 0
            return refused.code


async def until_not_ready(port: int) -> float:
    """When /readyz first said 503, on a connection of its own each time; it must still be listened to then."""
    while True:
        answer = await ask(port, "GET", "/readyz")
        if answer.status != 200:
            assert (answer.status, answer.json["code"], answer.headers["connection"]) == (503, "draining", "close")
            return time.monotonic()
        await asyncio.sleep(0.01)
