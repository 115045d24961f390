"""R12: the disk is full, the database is locked by another process, a row is damaged."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from htm_client import AsyncHTMClient, HTMClient, RequestRefused, ServerUnavailable

from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.served.server import ROOT

DIM, SIZE = 64, 8
TOKENS = np.random.default_rng(12).standard_normal((400, DIM)).astype(np.float32)
LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""
"""Locks a database until stdin is closed."""
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT_DATA = """
for word; do [ "$last" = --data ] && data=$word; last=$word; done
mkdir -p "$data" && mount -t tmpfs -o size=12m t "$data" && exec "$@"
"""
"""Runs a command, with a file system of its own at what follows --data."""


def test_r12_a_full_disk_is_said_and_writing_goes_on_after_it(start_server: StartServer, tally: Tally) -> None:
    """A file system of 12 MiB, in a mount namespace of the server's own."""
    try:
        subprocess.run([*IN_NAMESPACE, "mount", "-t", "tmpfs", "t", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    server = start_server(program="api", before=[*IN_NAMESPACE, "sh", "-c", MOUNT_DATA, "sh"])
    ballast = Path(f"/proc/{server.pid}/root{server.data}/ballast")
    ballast.write_bytes(bytes(4 << 20))
    with HTMClient(server.url, retries=0) as client:
        for name in ("first", "second"):
            client.create_session(name, dim=DIM, chunk_size=SIZE)
        length = 0
        while tally.faults < 3:
            tally.requests += 1
            try:
                length = client.append("first", TOKENS).length
            except ServerUnavailable as error:
                assert (error.status, error.code) == (507, "disk_full"), error
                tally.faults += 1
        assert client.attend("first", TOKENS[:1]).length == length
        ballast.unlink()
        assert client.append("first", TOKENS).start == length
        assert client.append("second", TOKENS).length == len(TOKENS)
        stored = client.read("first", payloads=False).embeddings
    assert stored is not None and len(stored) == length + len(TOKENS)
    tally.rounds = 1
    tally.losses = int((stored != np.tile(TOKENS, (len(stored) // len(TOKENS), 1))).any(axis=1).sum())
    assert tally.losses == 0
    assert server.end(signal.SIGTERM) == 0


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """The database, locked by another process."""
    command = [sys.executable, "-c", LOCKER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
        process.stdin.close()


def test_r12_a_database_locked_by_another_process(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    """A running server says 503 and goes on afterwards; one that starts refuses with a sentence. Each waits for 5 s."""
    server = start_server()
    database = server.data / "htm.sqlite3"
    with HTMClient(server.url, retries=0, timeout=30) as client:
        client.create_session("s", dim=DIM)
        for number in range(scale.locks):
            with locked(database), pytest.raises(ServerUnavailable, match="locked") as refused:
                client.append("s", TOKENS)
            assert (refused.value.status, refused.value.code) == (503, "unhealthy")
            client.ready()
            assert client.append("s", TOKENS).start == number * len(TOKENS)
        assert server.end(signal.SIGKILL) < 0
    with locked(database):
        began = time.monotonic()
        server.begin()
        assert server.first_line() == ""
        assert server.wait() == 1
        waited_s = time.monotonic() - began
    told = server.log.read_text().splitlines()[-1]
    assert told.startswith("htm-service: ") and "locked" in told and str(database) in told
    server.start()
    with HTMClient(server.url) as client:
        tally.losses = scale.locks * len(TOKENS) - client.session("s").length
    tally.rounds = tally.faults = scale.locks + 1
    tally.requests = 3 * scale.locks
    tally.figures["refused_after_s"] = round(waited_s, 1)
    assert tally.losses == 0


async def test_r12_a_damaged_row_concerns_its_session_alone(start_server: StartServer, tally: Tally) -> None:
    server = await asyncio.to_thread(start_server)
    names = [f"s{number}" for number in range(6)]
    async with AsyncHTMClient(server.url, retries=0) as client:
        for name in names:
            await client.create_session(name, dim=DIM, chunk_size=SIZE)
            await client.append(name, TOKENS)
        before = {name: (await client.attend(name, TOKENS[:1])).output for name in names}
    await asyncio.to_thread(server.end, signal.SIGTERM)
    with contextlib.closing(sqlite3.connect(server.data / "htm.sqlite3")) as database, database:
        sid = database.execute("SELECT sid FROM sessions WHERE id = 's3'").fetchone()[0]
        (start, data) = database.execute("SELECT start, data FROM blocks WHERE log = ?", [sid]).fetchone()
        flipped = bytes([data[1000] ^ 1])
        changed = data[:1000] + flipped + data[1001:]
        database.execute("UPDATE blocks SET data = ? WHERE log = ? AND start = ?", [changed, sid, start])
    checked = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "api", "verify", str(server.data)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert checked.returncode == 1 and "session s3: " in checked.stdout and "1 problems" in checked.stdout
    await asyncio.to_thread(server.start)
    async with AsyncHTMClient(server.url, retries=0) as client:
        outcomes = await asyncio.gather(*(client.attend(name, TOKENS[:1]) for name in names), return_exceptions=True)
        for name, outcome in zip(names, outcomes, strict=True):
            if name == "s3":
                assert isinstance(outcome, RequestRefused) and outcome.code == "session_damaged"
                assert "'s3' is damaged at position 0" in outcome.detail
            else:
                assert not isinstance(outcome, BaseException), outcome
                assert outcome.output is not None
                tally.losses += not (outcome.output == before[name]).all()
                appended = await client.append(name, TOKENS[:1])
                tally.losses += appended.start != len(TOKENS)
        await client.ready()
    tally.rounds, tally.faults, tally.requests = 1, 1, 2 * len(names)
    assert tally.losses == 0
