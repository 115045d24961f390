"""Idle sessions go by themselves, from every tier, and nobody waits for that."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.errors import DiskFull, SessionExpired, SessionNotFound, Unhealthy
from htm_service.records import AppendRequest, AppendResult, CreateRequest, SessionChange
from htm_service.sessions import directory
from htm_service.writes import expiry
from storage.base import DeleteSession, Store, StoreError, StoreFull
from storage.resolve import open_store
from tests.engine.inside import session_of
from tests.engine.test_attend import DIM, fill, vectors
from tests.engine.test_sessions import QUERY, right
from tests.names import named

TOKENS = vectors(1, 9, DIM)


class Clock:
    """Time that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(expiry, "PAUSE_S", 0)
    return Clock()


@pytest.fixture
def store(sqlite_url: str) -> Store:
    return open_store(sqlite_url)


@pytest.fixture
async def engine(store: Store, clock: Clock) -> AsyncIterator[Engine]:
    """Sweeps when the test says so."""
    engine = Engine(EngineConfig(device="cpu", expiry_interval_s=3600), store, clock=clock)
    await engine.start()
    yield engine
    await engine.close()
    store.close()


def num_rows(path: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def test_expired_sessions_leave_device_caches_and_disk(engine: Engine, clock: Clock, tmp_path: Path) -> None:
    """More of them than one step looks at; those that are used, or may live for ever, stay."""
    await asyncio.gather(*(fill(engine, f"s{i:03}", TOKENS, ttl_s=60) for i in range(411)))
    for name in ("kept", "used"):
        await fill(engine, name, TOKENS, ttl_s=60 if name == "used" else None)
    clock.now += 61
    session_of(engine, "used").last_used_at = clock.now
    pages = [number async for number in engine.directory.expire()]
    assert len(pages) == 3 and sum(pages) == 411
    await engine.expiry.expire()
    totals = (await engine.info()).totals
    assert (totals["sessions"], totals["expired_sessions"], totals["resident_sessions"]) == (2, 411, 2)
    assert {session.id for session in engine.directory.sessions()} == {"kept", "used"}
    assert num_rows(tmp_path / "htm.sqlite3", "blocks") == 2
    for name in ("kept", "used"):
        assert right(TOKENS, await engine.attend(named(name), QUERY))
    with pytest.raises(SessionExpired, match="'s000' was idle"):
        await engine.inspect(named("s000"))
    await fill(engine, "s000", TOKENS[:3])
    assert right(TOKENS[:3], await engine.attend(named("s000"), QUERY))


async def test_a_large_session_goes_by_steps_that_appends_come_between(
    engine: Engine, store: Store, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 16_384  # one token is a block
    await engine.create(named("large"), CreateRequest(dim=width, ttl_s=60))
    for _ in range(4):
        await engine.append(named("large"), AppendRequest(embeddings=vectors(2, 61, width)))
    await fill(engine, "other", TOKENS[:0])
    clock.now += 61
    order: list[str] = []
    for name in ("purge", "write"):
        monkeypatch.setattr(store, name, _recorded(order, name, getattr(store, name)))
    expiring = asyncio.create_task(engine.expiry.expire())
    while not expiring.done():
        await engine.append(named("other"), AppendRequest(embeddings=TOKENS))
    await expiring
    first, last = order.index("purge"), len(order) - order[::-1].index("purge")
    assert order[first:last].count("purge") >= 3 and "write" in order[first:last]
    assert num_rows(tmp_path / "htm.sqlite3", "leftovers") == 0
    assert (tmp_path / "htm.sqlite3").stat().st_size < 9 << 20, "of 16 MB, the free space that is kept"


def _recorded(order: list[str], name: str, call: Any) -> Any:
    def record(*args: Any, **kwargs: Any) -> Any:
        order.append(name)
        return call(*args, **kwargs)

    return record


async def test_a_deleted_session_is_off_the_disk_when_that_is_answered(engine: Engine, tmp_path: Path) -> None:
    await engine.create(named("s"), CreateRequest(dim=DIM))
    for number in range(131):
        await engine.append(
            named("s"), AppendRequest(embeddings=TOKENS, payloads=[b"{}"] * 9, idempotency_key=str(number))
        )
    await engine.delete(named("s"))
    assert [num_rows(tmp_path / "htm.sqlite3", name) for name in ("blocks", "payloads", "idempotency")] == [0, 0, 0]


async def test_the_last_expired_ids_are_remembered_and_no_more(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "EXPIRED_REMEMBERED", 3)
    for name in "abcde":
        await fill(engine, name, TOKENS[:0], ttl_s=60)
        clock.now += 1
    clock.now += 60
    await engine.expiry.expire()
    for name, error in zip("abcde", [SessionNotFound] * 2 + [SessionExpired] * 3, strict=True):
        with pytest.raises(error):
            await engine.inspect(named(name))


async def test_a_session_that_is_used_while_the_expiry_waits_for_it_stays(
    engine: Engine, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are being changed: the expiry waits for that, and the session counts as used meanwhile."""
    await fill(engine, "s", TOKENS, ttl_s=60)
    is_writing, let_go, write = threading.Event(), threading.Event(), store.write

    def wait(writes: Any, *, now: float) -> Any:
        is_writing.set()
        assert let_go.wait(20)
        return write(writes, now=now)

    monkeypatch.setattr(store, "write", wait)
    changing = asyncio.create_task(engine.update(named("s"), SessionChange(labels={"a": "b"})))
    await asyncio.to_thread(is_writing.wait)
    clock.now += 61
    expiring = asyncio.create_task(engine.expiry.expire())
    await asyncio.sleep(0.05)
    session_of(engine, "s").last_used_at = clock.now
    let_go.set()
    await asyncio.gather(changing, expiring)
    assert right(TOKENS, await engine.attend(named("s"), QUERY))


async def test_what_cannot_be_deleted_has_expired_all_the_same(
    engine: Engine, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting needs room on the disk, too. Once it is there, the next expiry does it."""
    await fill(engine, "s", TOKENS, ttl_s=60)
    clock.now += 61
    write = store.write

    def full(writes: Any, *, now: float) -> Any:
        if any(isinstance(change, DeleteSession) for change in writes):
            raise StoreFull("the disk is full")
        return write(writes, now=now)

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(SessionExpired):
        await engine.attend(named("s"), QUERY)
    with pytest.raises(DiskFull):
        await engine.expiry.expire()
    with pytest.raises(DiskFull):
        await engine.create(named("s"), CreateRequest(dim=DIM))
    monkeypatch.undo()
    await engine.expiry.expire()
    assert store.get_session(named("s")) is None


@pytest.mark.parametrize(("error", "expected"), [(StoreFull("full"), DiskFull), (StoreError("locked"), Unhealthy)])
async def test_a_failing_purge_is_told_and_begun_again(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch, error: StoreError, expected: type[Exception]
) -> None:
    def fail(sid: int | None = None) -> bool:
        raise error

    await fill(engine, "s", TOKENS)
    monkeypatch.setattr(store, "purge", fail)
    with pytest.raises(expected, match=str(error)):
        await engine.delete(named("s"))
    with pytest.raises(expected):
        await engine.expiry.expire()
    monkeypatch.undo()
    await engine.expiry.expire()


async def test_upkeep_that_fails_does_not_have_its_group_written_again(engine: Engine) -> None:
    """A bug there failed the batch after its group was on disk, so all of it was written again, item by item."""
    await fill(engine, "s", TOKENS)

    def fail() -> bool:
        raise RuntimeError("a bug")

    async def submit() -> object:
        return await engine.committer.upkeep(fail)

    append = engine.append(named("s"), AppendRequest(embeddings=TOKENS))
    appended, failure = await asyncio.gather(append, submit(), return_exceptions=True)
    assert isinstance(appended, AppendResult) and appended.length == 2 * len(TOKENS)
    assert isinstance(failure, RuntimeError)
    assert (await engine.inspect(named("s"))).length == 2 * len(TOKENS)


async def test_an_expiry_that_fails_is_not_the_last(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [StoreError("locked"), RuntimeError("a bug")]
    list_sessions, done = store.list_sessions, asyncio.Event()

    def fail_twice(**which: Any) -> Any:
        if failures:
            raise failures.pop(0)
        loop.call_soon_threadsafe(done.set)
        return list_sessions(**which)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(store, "list_sessions", fail_twice)
    engine = Engine(EngineConfig(device="cpu", expiry_interval_s=0.001), store, clock=clock)
    await engine.start()
    await asyncio.wait_for(done.wait(), 30)
    await engine.close()
    store.close()
    assert "is tried again: sessions cannot be listed: locked" in caplog.text and "a bug" in caplog.text


async def test_who_goes_while_a_session_expires_leaves_nothing_behind(
    engine: Engine, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session was out of the table, its deletion skipped: its pages stayed on the device, and nobody knew them."""
    await fill(engine, "s", TOKENS, ttl_s=60)
    clock.now += 61
    is_writing, let_go, write = threading.Event(), threading.Event(), store.write
    is_waiting, batcher = asyncio.Event(), engine.committer.queue

    def wait(writes: Any, *, now: float) -> Any:
        is_writing.set()
        let_go.wait()
        return write(writes, now=now)

    monkeypatch.setattr(store, "write", wait)
    other = asyncio.create_task(engine.create(named("other"), CreateRequest(dim=DIM)))
    await asyncio.to_thread(is_writing.wait)
    submit = batcher.submit

    def wait_too(*work: Any, **how: Any) -> Any:
        is_waiting.set()
        return submit(*work, **how)

    monkeypatch.setattr(batcher, "submit", wait_too)
    asked = asyncio.create_task(engine.attend(named("s"), QUERY))
    await is_waiting.wait()
    asked.cancel()
    await asyncio.wait([asked])
    let_go.set()
    await other
    with pytest.raises(SessionExpired):
        await engine.attend(named("s"), QUERY)
    assert (await engine.info()).totals["device_bytes"] == 0
