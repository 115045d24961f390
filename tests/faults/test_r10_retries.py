"""R10: appends are sent again after their answers were lost, and writers race: nothing is there twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from htm_client import AsyncHTMClient, LengthConflict

from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale

DIM = 13


class LossyProxy:
    """Carries requests to the server, and every other time ends the connection instead of carrying the answer back."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.num_lost = 0
        self.num_requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                to_server.write(await message(reader))
                answer = await message(from_server)
                self.num_requests += 1
                if self.num_requests % 2:
                    self.num_lost += 1
                    break
                writer.write(answer)
        for end in (writer, to_server):
            end.close()


async def message(reader: asyncio.StreamReader) -> bytes:
    """One request or answer, whole."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    return head + await reader.readexactly(int(length.split(b":")[1]))


@contextlib.asynccontextmanager
async def lossy(port: int) -> AsyncIterator[tuple[LossyProxy, str]]:
    """A proxy and its address."""
    proxy = LossyProxy(port)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as listener:
        yield proxy, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def no_sleep(seconds: float) -> None:
    """Retries need not wait here."""


async def test_r10_an_append_whose_answer_was_lost_is_there_once(
    start_server: StartServer, tally: Tally, scale: Scale
) -> None:
    server = await asyncio.to_thread(start_server)
    tokens = np.random.default_rng(1).standard_normal((3 * scale.lost_answers, DIM)).astype(np.float32)
    async with lossy(server.port) as (proxy, address), AsyncHTMClient(address, sleep=no_sleep) as client:
        await client.create_session("s", dim=DIM)
        while proxy.num_lost <= scale.lost_answers:
            start = 3 * tally.rounds
            if tally.rounds % 2:
                appended = (await client.step("s", tokens[:1], tokens[start : start + 3])).appended
            else:
                appended = await client.append("s", tokens[start : start + 3])
            tally.losses += (appended.start, appended.length) != (start, start + 3)
            tally.rounds += 1
        tally.faults, tally.requests = proxy.num_lost, proxy.num_requests
    async with AsyncHTMClient(server.url) as client:
        stored = (await client.read("s", payloads=False)).embeddings
    assert stored is not None and len(stored) == 3 * tally.rounds
    assert (stored == tokens[: len(stored)]).all()
    assert tally.losses == 0


async def test_r10_of_racing_writers_exactly_one_wins(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server)
    rows = np.eye(2, DIM, dtype=np.float32)
    winners = []
    async with AsyncHTMClient(server.url) as first, AsyncHTMClient(server.url) as second:
        await first.create_session("s", dim=DIM)
        for length in range(scale.races):
            calls = [
                client.append("s", row, if_length=length) for client, row in zip((first, second), rows, strict=True)
            ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            conflicts = [outcome for outcome in outcomes if isinstance(outcome, LengthConflict)]
            tally.losses += len(conflicts) != 1 or conflicts[0].length != length + 1
            winners.append(0 if isinstance(outcomes[1], LengthConflict) else 1)
            tally.requests += 2
        stored = (await first.read("s", payloads=False)).embeddings
    tally.rounds = tally.faults = scale.races
    assert tally.losses == 0
    assert stored is not None and (stored == rows[winners]).all()
