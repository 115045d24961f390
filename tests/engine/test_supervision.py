"""Threads that die or are stuck: everyone is refused at once, and the engine says why."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.errors import Draining, Unhealthy
from htm_service.records import AppendRequest, AttendRequest
from storage.base import Block
from storage.in_memory import MemoryStore
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, fill, vectors
from tests.names import named

QUERY = AttendRequest(queries=vectors(1, 1, DIM))


@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_loader_fails_everyone(make_engine: MakeEngine) -> None:
    """It died unseen, and whoever wanted a cold session waited for its deadline."""
    store = MemoryStore()
    await fill(await make_engine(store), "s", vectors(1, 9, DIM))
    engine = await make_engine(store)
    engine.worker.loader.fetch(None)  # type: ignore[arg-type]
    with pytest.raises(Unhealthy, match="the loader thread died"):
        await engine.attend(named("s"), QUERY)
    assert "loader thread died" in (engine.unhealthy_reason() or "")


async def test_a_dead_store_thread_fails_those_who_read_too(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await fill(engine, "s", vectors(1, 9, DIM))

    def die() -> None:
        raise RuntimeError("no such disk")

    engine.committer.queue.post(die)
    with pytest.raises(Unhealthy, match="no such disk"):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(1, 1, DIM)))
    for _ in range(500):
        if engine.worker.queue.unhealthy_reason is not None:
            break
        await asyncio.sleep(0.01)
    with pytest.raises(Unhealthy, match=r"the store thread died: .*no such disk"):
        await engine.attend(named("s"), QUERY)


async def test_a_stuck_thread_is_found(make_engine: MakeEngine) -> None:
    engine = await make_engine(stuck_s=0.2)
    await fill(engine, "s", vectors(1, 9, DIM))
    assert (await engine.attend(named("s"), QUERY)).length == 9
    release = threading.Event()

    def hang() -> None:
        release.wait(20)

    engine.worker.queue.post(hang)
    with pytest.raises(Unhealthy, match=r"the device thread is stuck: it has been at one thing for 0\.\d s"):
        await engine.attend(named("s"), QUERY)
    with pytest.raises(Unhealthy, match="device thread is stuck"):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(1, 1, DIM)))
    release.set()


async def test_a_loader_that_does_not_stop_is_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left behind, reading from a store that was being closed."""
    store = MemoryStore()
    await fill(await make_engine(store), "s", vectors(1, 9, DIM))
    engine = await make_engine(store)
    reading, release = threading.Event(), threading.Event()

    def hang(*args: object) -> Iterator[Block]:
        reading.set()
        release.wait(20)
        return iter(())

    monkeypatch.setattr(store, "read_blocks", hang)
    attend = asyncio.create_task(engine.attend(named("s"), QUERY))
    await asyncio.to_thread(reading.wait, 20)
    await engine.close(0.1)
    with pytest.raises(Draining):
        await attend
    assert "the loader thread did not stop within 1 s" in caplog.text
    release.set()


async def test_an_engine_that_never_started_closes() -> None:
    """As when a start fails half-way: there is no thread to wait for."""
    engine = Engine(EngineConfig(device="cpu"), MemoryStore())
    await engine.close()
    with pytest.raises(Draining):
        await engine.recalls(named("s"))


async def test_a_thread_without_work_is_not_stuck(make_engine: MakeEngine) -> None:
    engine = await make_engine(stuck_s=0.2)
    await fill(engine, "s", vectors(1, 9, DIM))
    await asyncio.sleep(0.6)
    assert (await engine.attend(named("s"), QUERY)).length == 9
