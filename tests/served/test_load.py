"""2,000 mixed requests, 256 at a time, over 64 sessions: no error, right answers, order kept, a loop that goes on."""

import asyncio

import numpy as np
from htm_client import AsyncHTMClient

from htm_service.attention.model import RetrievalModel
from tests.reference import htm_reference, relative_error
from tests.served.probe import end_probe, start_probe
from tests.served.server import Server

NUM_SESSIONS, NUM_REQUESTS, NUM_AT_ONCE, DIM, SIZE = 64, 2_000, 256, 31, 8
MAX_GAP_S = 0.1


async def test_mixed_requests(server: Server) -> None:
    server.start()
    draw = np.random.default_rng(3)
    queries = draw.standard_normal((NUM_SESSIONS, 1, DIM)).astype(np.float32) / np.float32(3)
    sent: dict[int, list[np.ndarray]] = {number: [] for number in range(NUM_SESSIONS)}
    attended: list[tuple[int, int, np.ndarray]] = []
    stepped: list[tuple[int, int, np.ndarray]] = []
    batch_sizes: list[int] = []
    locks = [asyncio.Lock() for _ in range(NUM_SESSIONS)]

    async with AsyncHTMClient(server.url, timeout=60) as client:
        for number in range(NUM_SESSIONS):
            await client.create_session(f"s{number}", dim=DIM, chunk_size=SIZE)

        async def one(place: int) -> None:
            number = place % NUM_SESSIONS
            name, kind = f"s{number}", (place // NUM_SESSIONS) % 5
            rows = draw.standard_normal((1 + place % 3, DIM)).astype(np.float32)
            if kind in (0, 1):
                async with locks[number]:  # one writer a session, as an agent is
                    appended = await client.append(name, rows, payloads=[{"n": place}] * len(rows))
                    assert appended.start == sum(map(len, sent[number]))
                    sent[number].append(rows)
            elif kind == 2:
                async with locks[number]:
                    both = await client.step(name, queries[number], rows)
                    assert both.appended.start == both.attended.length == sum(map(len, sent[number]))
                    sent[number].append(rows)
                    assert both.attended.output is not None
                    stepped.append((number, both.attended.length, both.attended.output))
            elif kind == 3:
                answer = await client.attend(name, queries[number], returns=["output", "payloads"])
                assert answer.output is not None
                attended.append((number, answer.length, answer.output))
                batch_sizes.append(answer.batch_size)
            else:
                assert (await client.session(name)).id == name

        places = iter(range(NUM_REQUESTS))

        async def some() -> None:
            for place in places:
                await one(place)

        probing = await asyncio.to_thread(start_probe, server.port, server.pid)
        await asyncio.gather(*(some() for _ in range(NUM_AT_ONCE)))
        gaps = await asyncio.to_thread(end_probe, probing)

    assert max(batch_sizes) > 1
    for number, length, output in attended + stepped:
        tokens = np.concatenate([np.zeros((0, DIM), np.float32), *sent[number]])[:length]
        expected = htm_reference(queries[number], tokens, RetrievalModel().config, chunk_size=SIZE).output
        assert relative_error(output, expected) <= 1e-5 if length else not output.any()
    print(f"the longest counted {[round(gap * 1e3) for gap in gaps[-5:]]} ms")
    assert len(gaps) > 20
    # One collection of garbage over everything that torch brings once held the loop for 200 to 350 ms. Two answers may
    # take up to twice the bar, because the machine may take the server's core away for a moment.
    assert gaps[-3] < MAX_GAP_S and gaps[-1] < 2 * MAX_GAP_S
