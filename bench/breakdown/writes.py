"""What each layer leaves of the rate of a raw log, for durable appends of one token in groups.

Beside it the same log with writers in front of it: what is left when each append is awaited, and nothing else is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import uvloop

from bench import machine
from bench.scene import DIM, Scene
from storage.base import Append, CreateSession, SessionRow
from storage.databases.sqlite import PAGE_BYTES
from storage.resolve import open_store

GROUP = 32
NUM_BEFORE = 1_000
"""Appends that each session has had before, so that its next one has a place of its own in the index."""
_COLUMNS = "sid INTEGER, start INTEGER, num_tokens INTEGER, episode INTEGER, checksum INTEGER, data BLOB"
_VALUES = "(sid, start, num_tokens, episode, checksum, data) VALUES (?, ?, ?, ?, ?, ?)"


def layers(stage: Scene, quick: bool) -> list[tuple[str, float]]:
    """Appends per second of a raw log, of one with writers, of bare SQLite in three layouts, and of the store, whose
    layout is the first of these.

    All are synced once per group.
    """
    num_groups = 30 if quick else 500
    record = np.random.default_rng(0).standard_normal(DIM, dtype=np.float32).tobytes()
    raw = machine.raw_log_rate(stage.directory, [GROUP] * num_groups, len(record))
    found = [("raw log: write and fdatasync", raw)]
    awaited = uvloop.run(_awaited_log(stage.directory / "awaited.log", record, num_groups))
    found.append((f"{GROUP} writers that await it, a thread that writes it, nothing else", awaited))
    for name, columns, per_group in (
        ("SQLite: a row per append, by session and start", f"{_COLUMNS}, PRIMARY KEY (sid, start)", GROUP),
        ("SQLite: a row per append, as they come", f"id INTEGER PRIMARY KEY, {_COLUMNS}", GROUP),
        ("SQLite: a row per group", f"id INTEGER PRIMARY KEY, {_COLUMNS}", 1),
    ):
        path = stage.directory / f"bare{len(found)}.sqlite3"
        found.append((name, _bare_sqlite(path, columns, per_group, record, num_groups)))
    found.append(
        ("the store: owner, lengths, checksums", _store(stage.directory / "store.sqlite3", record, num_groups))
    )
    return found


async def _awaited_log(path: Path, record: bytes, num_groups: int) -> float:
    """Each writer awaits a future per record; all that were made in a turn of the loop are one group."""
    loop = asyncio.get_running_loop()
    groups: SimpleQueue[list[asyncio.Future[None]]] = SimpleQueue()
    waiting: list[asyncio.Future[None]] = []

    def write() -> None:
        with path.open("ab", buffering=0) as file:
            while futures := groups.get():
                file.write(record * len(futures))
                os.fdatasync(file.fileno())
                loop.call_soon_threadsafe(resolve, futures)

    def resolve(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            future.set_result(None)

    def hand_over() -> None:
        groups.put(waiting.copy())
        waiting.clear()

    async def writer() -> None:
        for _ in range(num_groups):
            if not waiting:
                loop.call_soon(hand_over)
            waiting.append(future := loop.create_future())
            await future

    thread = Thread(target=write)
    thread.start()
    began = time.perf_counter()
    await asyncio.gather(*(writer() for _ in range(GROUP)))
    rate = GROUP * num_groups / (time.perf_counter() - began)
    groups.put([])
    thread.join()
    return rate


def _bare_sqlite(path: Path, columns: str, per_group: int, record: bytes, num_groups: int) -> float:
    """One table with these columns, and `per_group` rows for each group of appends, which hold all of its bytes."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _set_up(connection, f"blocks ({columns})")
        starts = count()

        def insert(data: bytes) -> None:
            start = next(starts)
            rows = [(sid, start, 1, None, 0, data) for sid in range(per_group)]
            connection.executemany(f"INSERT INTO blocks {_VALUES}", rows)

        connection.execute("BEGIN")
        for _ in range(NUM_BEFORE):
            insert(b"")
        connection.execute("COMMIT")

        def write() -> None:
            connection.execute("BEGIN IMMEDIATE")
            insert(record * (GROUP // per_group))
            connection.execute("COMMIT")

        return _rate(write, num_groups)


def _set_up(connection: sqlite3.Connection, *tables: str) -> None:
    for pragma in (f"page_size = {PAGE_BYTES}", "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    for table in tables:
        connection.execute(f"CREATE TABLE {table}")


def _store(path: Path, record: bytes, num_groups: int) -> float:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sessions = store.write([CreateSession(SessionRow(f"s{at}", {}, 0.0)) for at in range(GROUP)], now=0.0)
        sids = [session.sid for session in sessions if isinstance(session, SessionRow)]
        return _rate(lambda: store.write([Append(sid, 1, record) for sid in sids], now=0.0), num_groups)


def _rate(write: Callable[[], object], num_groups: int) -> float:
    write()
    began = time.perf_counter()
    for _ in range(num_groups):
        write()
    return GROUP * num_groups / (time.perf_counter() - began)
