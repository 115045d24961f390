"""R8: sessions are created, filled and ended, over and over: memory, descriptors, threads and disk return to base."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from htm_client import AsyncHTMClient, RequestRefused

from storage.databases.sqlite import MAX_POOLED_READERS
from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.served.server import Server

DIM, LENGTH, NUM_CLIENTS = 32, 65, 24
WARM_UP = 100
TTL_S = 0.001
MAX_MEMORY_MIB, MAX_DISK_MIB = 32.0, 2.0
"""What the last sessions may leave behind: memory that the allocator keeps, and part of the write-ahead log."""
MAX_DESCRIPTORS = 2 + 2 * MAX_POOLED_READERS
"""Connections that read are opened as they are needed and then kept, two files each: the warm-up may not need all."""
TOKENS = np.random.default_rng(8).standard_normal((LENGTH, DIM)).astype(np.float32)
PAYLOADS = [{"text": str(position)} for position in range(LENGTH)]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its data take."""

    memory_mib: float
    descriptors: int
    threads: int
    disk_mib: float

    @classmethod
    def of(cls, server: Server) -> Usage:
        process = Path(f"/proc/{server.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return cls(
            pages * 4096 / (1 << 20),
            len(list((process / "fd").iterdir())),
            len(list((process / "task").iterdir())),
            sum(file.stat().st_size for file in server.data.iterdir() if file.is_file()) / (1 << 20),
        )


async def test_r8_sessions_come_and_go_and_leave_nothing(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server)
    async with AsyncHTMClient(server.url) as client:
        for first, last in ((0, WARM_UP), (WARM_UP, WARM_UP + scale.sessions)):
            base = await asyncio.to_thread(at_rest, server)
            numbers = iter(range(first, last))
            await asyncio.gather(*(live(client, numbers, tally) for _ in range(NUM_CLIENTS)))
        totals = (await client.info())["totals"]
        after = await asyncio.to_thread(at_rest, server)
    tally.rounds = tally.faults = scale.sessions
    tally.figures = {
        "memory_mib": round(after.memory_mib - base.memory_mib, 1),
        "descriptors": after.descriptors - base.descriptors,
        "threads": after.threads - base.threads,
        "disk_mib": round(after.disk_mib - base.disk_mib, 1),
    }
    assert tally.losses == 0
    assert after.descriptors <= base.descriptors + MAX_DESCRIPTORS and after.threads <= base.threads + 2
    assert after.disk_mib <= base.disk_mib + MAX_DISK_MIB
    assert after.memory_mib <= base.memory_mib + MAX_MEMORY_MIB
    assert (totals["sessions"], totals["tokens"], totals["resident_sessions"]) == (0, 0, 0)


def at_rest(server: Server) -> Usage:
    """What the server takes once what was deleted is erased; until then its log has the size of what was done."""
    log, deadline = server.data / "htm.sqlite3-wal", time.monotonic() + 60
    while log.exists() and log.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.1)
    return Usage.of(server)


async def live(client: AsyncHTMClient, numbers: Iterator[int], tally: Tally) -> None:
    """One session after the other; every other one is not deleted, but expires."""
    for number in numbers:
        name = f"s{number}"
        await client.create_session(name, dim=DIM)
        await client.append(name, TOKENS, payloads=PAYLOADS)
        (recalled,) = await client.recall(name, TOKENS[number % LENGTH], n=1)
        tally.losses += recalled.payload != PAYLOADS[number % LENGTH]
        if number % 2:
            await client.delete_session(name)
        else:
            await client.update_session(name, ttl_s=TTL_S)
            await asyncio.sleep(2 * TTL_S)
        with pytest.raises(RequestRefused) as gone:
            await client.session(name)
        tally.losses += gone.value.code not in ("session_not_found", "session_expired")
        tally.requests += 5
