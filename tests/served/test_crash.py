"""`kill -9` of a real server under load: everything acknowledged is there, whole, once and in order."""

import asyncio
import random
import signal

import numpy as np
from htm_client import AsyncHTMClient, ConnectionFailed, HTMClient

from tests.served.conftest import Server

DIM, NUM_WRITERS, NUM_ROUNDS = 17, 8, 4


def tokens_of(writer: int, start: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Token `position` of a writer is [writer, position, position, ...]: a wrong one shows."""
    rows = np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], DIM, axis=1)
    rows[:, 0] = writer
    return rows


async def write(url: str, writer: int, acknowledged: dict[int, int], draw: random.Random) -> None:
    """Append until the server is gone; without retries, so that what is acknowledged is known exactly."""
    async with AsyncHTMClient(url, retries=0) as client:
        while True:
            count, start = draw.choice([1, 1, 3, 40]), acknowledged[writer]
            payloads = [{"at": position} for position in range(start, start + count)]
            try:
                appended = await client.append(f"w{writer}", tokens_of(writer, start, count), payloads=payloads)
            except ConnectionFailed:
                return
            assert appended.start == start
            acknowledged[writer] = appended.length


async def load_and_kill(server: Server, acknowledged: dict[int, int], draw: random.Random) -> None:
    writers = [asyncio.create_task(write(server.url, writer, acknowledged, draw)) for writer in acknowledged]
    await asyncio.sleep(draw.uniform(0.3, 0.8))
    await asyncio.to_thread(server.end, signal.SIGKILL)
    await asyncio.gather(*writers)


def test_nothing_acknowledged_is_lost(server: Server) -> None:
    draw = random.Random(5)
    acknowledged = dict.fromkeys(range(NUM_WRITERS), 0)
    server.start()
    with HTMClient(server.url) as client:
        for writer in acknowledged:
            client.create_session(f"w{writer}", dim=DIM, chunk_size=7)
    total = 0
    for _ in range(NUM_ROUNDS):
        asyncio.run(load_and_kill(server, acknowledged, draw))
        server.start()
        with HTMClient(server.url) as client:
            for writer, length in acknowledged.items():
                memories = client.read(f"w{writer}")
                # The append in flight when the server died may be there, whole: its answer was lost, not it.
                assert memories.length in {length, length + 1, length + 3, length + 40}
                np.testing.assert_array_equal(memories.embeddings, tokens_of(writer, 0, memories.length))
                assert memories.payloads == [{"at": position} for position in range(memories.length)]
                acknowledged[writer] = memories.length
        total += sum(acknowledged.values())
    assert total > 0 and all(acknowledged.values())
    assert server.end(signal.SIGTERM) == 0
