"""R6: a restart with four times more data than memory. R7: one session four times larger than memory."""

from __future__ import annotations

import asyncio
import signal
import time

import numpy as np
from htm_client import AsyncHTMClient

from htm_service.attention.model import RetrievalModel
from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.wire import Floats
from tests.reference import htm_reference, relative_error

DIM, SIZE, TIMES, NUM_SESSIONS, NUM_ROUNDS = 61, 32, 4, 16, 3
APPEND_TOKENS = 4_096


async def test_r6_more_sessions_than_memory_after_a_restart(
    start_server: StartServer, tally: Tally, scale: Scale
) -> None:
    await beyond_the_budget(start_server, tally, scale, NUM_SESSIONS)


async def test_r7_a_session_larger_than_memory(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    await beyond_the_budget(start_server, tally, scale, 1)
    assert tally.figures["fetched_pages"] > 0


async def beyond_the_budget(
    start_server: StartServer, tally: Tally, scale: Scale, num_sessions: int, num_queries: int = 2
) -> None:
    """Fill so many sessions, kill the server, start it again, attend to all of them at once; in the end as first."""
    budget = scale.budget_mib << 20
    server = await asyncio.to_thread(start_server, "--memory-budget", str(budget))
    length = TIMES * budget // (DIM * 4 * num_sessions) + 1
    draw = np.random.default_rng(num_sessions)
    tokens = {f"s{number}": draw.standard_normal((length, DIM)).astype(np.float32) for number in range(num_sessions)}
    async with AsyncHTMClient(server.url, timeout=60) as client:
        for name, rows in tokens.items():
            await client.create_session(name, dim=DIM, chunk_size=SIZE)
            for start in range(0, length, APPEND_TOKENS):
                await client.append(name, rows[start : start + APPEND_TOKENS])
    await asyncio.to_thread(server.end, signal.SIGKILL)
    began = time.monotonic()
    await asyncio.to_thread(server.start)
    tally.figures["ready_s"] = round(time.monotonic() - began, 2)

    async with AsyncHTMClient(server.url, timeout=60) as client:
        assert (await client.info())["totals"]["device_bytes"] == 0, "sessions load when they are asked for"
        asked = [
            {name: rows[draw.integers(length, size=num_queries)] * np.float32(0.3) for name, rows in tokens.items()}
            for _ in range(NUM_ROUNDS)
        ]
        for queries in (*asked, asked[0]):
            answers = await asyncio.gather(*(client.attend(name, query) for name, query in queries.items()))
            for (name, query), answer in zip(queries.items(), answers, strict=True):
                some = slice(None, None, num_queries // 2)  # the definition in float64 takes seconds for many
                tally.losses += answer.output is None or not is_right(query[some], tokens[name], answer.output[some])
            totals = (await client.info())["totals"]
            assert totals["device_bytes"] <= budget
            tally.requests += len(answers)
    tally.rounds, tally.faults = NUM_ROUNDS + 1, 1
    data_bytes = sum(rows.nbytes for rows in tokens.values())
    tally.figures |= {"data_per_budget": round(data_bytes / budget, 2), "fetched_pages": totals["fetched_pages"]}
    assert data_bytes >= TIMES * budget and tally.losses == 0


def is_right(queries: Floats, tokens: Floats, output: Floats) -> bool:
    expected = htm_reference(queries, tokens, RetrievalModel().config, chunk_size=SIZE).output
    return relative_error(output, expected) <= 1e-5
