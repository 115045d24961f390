"""R1: the power goes: whatever the disk kept of what was not synced, all that was acknowledged is there."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from htm_client import AsyncHTMClient

from storage.base import Store, StoreError
from storage.resolve import open_store
from tests.faults.conftest import StartServer
from tests.faults.disk import Operation, build_shim, cut_power, read_log
from tests.faults.journal import Journal
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.names import named
from tests.served.server import Server

NUM_WRITERS, NUM_ROWS = 6, 40_000
MAX_LOAD_S, WANTED_CHECKPOINTS = 20.0, 2


async def test_r1_nothing_acknowledged_is_lost_with_the_power(
    start_server: StartServer, tally: Tally, scale: Scale, tmp_path: Path
) -> None:
    library = build_shim(tmp_path)
    if library is None:
        pytest.skip("there is no C compiler to build log_writes.c with")
    log = tmp_path / "writes.log"
    environment = {"LD_PRELOAD": str(library), "LOG_WRITES": str(log)}
    server = await asyncio.to_thread(start_server, program="api", environment=environment)
    journals = [Journal(writer, NUM_ROWS) for writer in range(NUM_WRITERS)]
    ready_at = time.monotonic()
    await load(server, journals, log)
    operations = read_log(log)
    first = next(place for place, operation in enumerate(operations) if operation.began_at > ready_at)
    syncs = [place for place, operation in enumerate(operations) if operation.kind == "s"]
    checkpoints = [place for place in syncs if place >= first and operations[place].file == 1]
    tally.requests = sum(journal.num_calls for journal in journals)
    tally.figures = {"writes": sum(operation.kind == "w" for operation in operations), "syncs": len(syncs)}
    tally.figures["checkpoints"] = len(checkpoints)
    assert checkpoints, "the log was never folded into the database"

    draw = random.Random(1)
    lost_by_lies = 0
    lying = [replace(operation, kind="-") if operation.kind == "s" else operation for operation in operations]
    for number in range(scale.power_cuts):
        at = moment(operations[first:], [place - first for place in checkpoints], draw)
        tally.losses += await asyncio.to_thread(losses_at, at, operations, journals, draw, tmp_path)
        if number < 5:  # the same on a disk that says synced and is not: the test must see that
            lost_by_lies += await asyncio.to_thread(losses_at, at, lying, journals, draw, tmp_path)
    tally.rounds = tally.faults = scale.power_cuts
    assert tally.losses == 0
    assert lost_by_lies > 0


async def load(server: Server, journals: Sequence[Journal], log: Path) -> None:
    """Write until the log has been folded into the database some times, then kill the server."""
    async with AsyncHTMClient(server.url, retries=0) as client:
        for journal in journals:
            await journal.call(client, random.Random(0))
        writers = [asyncio.create_task(journal.write(client, random.Random(9))) for journal in journals]
        until = time.monotonic() + MAX_LOAD_S
        database = server.data / "htm.sqlite3"
        sizes = {database.stat().st_size}
        while len(sizes) <= WANTED_CHECKPOINTS and time.monotonic() < until:
            await asyncio.sleep(0.1)
            sizes.add(database.stat().st_size)
        await asyncio.to_thread(server.end, signal.SIGKILL)
        await asyncio.gather(*writers)


def moment(operations: Sequence[Operation], checkpoints: Sequence[int], draw: random.Random) -> float:
    """Half of the time anywhere, else while the log is folded into the database."""
    place = draw.randrange(len(operations))
    if draw.random() < 0.5:
        place = max(0, draw.choice(checkpoints) - draw.randrange(-5, 60))
    operation = operations[min(place, len(operations) - 1)]
    return draw.choice([operation.began_at, operation.ended_at]) + 1e-9


def losses_at(
    at: float, operations: Sequence[Operation], journals: Sequence[Journal], draw: random.Random, tmp_path: Path
) -> int:
    """Tokens that were acknowledged before the power went and are not there when the store is opened."""
    directory = tmp_path / "after"
    directory.mkdir()
    try:
        cut_power(operations, at, draw, directory)
        with contextlib.closing(open_store(f"sqlite:///{directory / 'htm.sqlite3'}")) as store:
            return sum(losses_of(journal, store, at) for journal in journals)
    except StoreError:
        return 1
    finally:
        shutil.rmtree(directory)


def losses_of(journal: Journal, store: Store, at: float) -> int:
    """Of one session; 1 for more than there may be, or for a torn append."""
    times, lengths = [when for when, _ in journal.history], [0, *(length for _, length in journal.history)]
    acknowledged = lengths[bisect_left(times, at)]
    row = store.get_session(named(journal.session))
    length = 0 if row is None else row.length
    data = b"" if row is None else b"".join(block.data for block in store.read_blocks(row.sid))
    stored = np.frombuffer(data, np.float32).reshape(-1, journal.rows.shape[1])
    num_same = int((stored == journal.rows[: len(stored)]).all(axis=1).sum())
    is_torn = length not in {*lengths, journal.acknowledged + journal.pending} or len(stored) != length
    return max(0, acknowledged - num_same) or int(is_torn or num_same != length)
