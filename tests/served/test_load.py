"""2,000 concurrent mixed requests over 64 sessions: no error, right answers, order kept, a loop that never stops."""

import asyncio
import time

import numpy as np
from htm_client import AsyncHTMClient

from htm_service.models import RetrievalModel
from tests.reference import htm_reference, relative_error
from tests.served.conftest import Server

NUM_SESSIONS, NUM_REQUESTS, DIM, SIZE = 64, 2_000, 31, 8
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

        gaps: list[float] = []
        stop = asyncio.Event()
        probing = asyncio.create_task(asyncio.to_thread(probe, server.port, stop, gaps))
        await asyncio.gather(*(one(place) for place in range(NUM_REQUESTS)))
        stop.set()
        await probing

    assert max(batch_sizes) > 1
    for number, length, output in attended + stepped:
        tokens = np.concatenate([np.zeros((0, DIM), np.float32), *sent[number]])[:length]
        expected = htm_reference(queries[number], tokens, RetrievalModel().config, chunk_size=SIZE).output
        assert relative_error(output, expected) <= 1e-5 if length else not output.any()
    assert len(gaps) > 20
    # This process shares two cores with the server: a gap counts when it is the rule, not one bad moment.
    assert np.percentile(gaps, 99) < MAX_GAP_S, sorted(gaps)[-10:]


def probe(port: int, stop: asyncio.Event, gaps: list[float]) -> None:
    """Ask /livez over one connection every 10 ms, from a thread of its own; how long each answer took."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not stop.is_set():
        began = time.perf_counter()
        connection.request("GET", "/livez")
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        gaps.append(time.perf_counter() - began)
        time.sleep(0.01)
    connection.close()
