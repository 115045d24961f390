"""A real server that is restarted under its clients: with default settings they notice a pause and nothing else."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from htm_client import AsyncHTMClient, HTMClient

from tests.served.forked import ForkedServer

DIM = 3
DOWN_S = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkedServer]:
    server = ForkedServer(tmp_path, program="api.cli")
    server.start()
    yield server
    server.close()


def restart(server: ForkedServer, how: signal.Signals) -> None:
    server.end(how)
    time.sleep(DOWN_S)
    server.start()


async def test_async_clients_outlast_a_restart(server: ForkedServer) -> None:
    """They gave up after half a second, and the server was back after three."""
    async with AsyncHTMClient(server.url) as client:
        await client.create_session("s", dim=DIM)
        is_over = asyncio.Event()
        numbers: list[int] = []

        async def write() -> None:
            while not is_over.is_set():
                numbers.append((await client.append("s", np.eye(DIM)[0])).start)
                await asyncio.sleep(0.01)

        writers = [asyncio.create_task(write()) for _ in range(5)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(restart, server, signal.SIGTERM)
        num_before = len(numbers)
        assert (await client.create_session(dim=DIM)).dim == DIM
        await asyncio.sleep(0.5)
        is_over.set()
        await asyncio.gather(*writers)
        assert len(numbers) > num_before and sorted(numbers) == list(range(len(numbers)))
        assert (await client.session("s")).length == len(numbers)


async def test_a_sync_client_outlasts_a_crash(server: ForkedServer) -> None:
    """A new session too, which is made once: nobody could be asked while the server was away."""
    with HTMClient(server.url) as client:
        client.create_session("s", dim=DIM)
        restarting = asyncio.create_task(asyncio.to_thread(restart, server, signal.SIGKILL))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(client.create_session, dim=DIM)
        await restarting
        assert len(list(client.sessions())) == 2
        assert client.append("s", np.eye(DIM)).length == DIM
