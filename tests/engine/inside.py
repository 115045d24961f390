"""What tests of the engine do to its sessions from the side: find them, take them off the device, run ahead of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from htm_service.engine import Engine
from htm_service.memory.resident import Resident
from htm_service.sessions.session import Session
from storage.base import Block

Answer = TypeVar("Answer")


def session_of(engine: Engine, name: str) -> Session:
    """A session that was used since the start."""
    (session,) = [session for session in engine.directory.sessions() if session.id == name]
    return session


async def on_device_thread(engine: Engine, act: Callable[[], Answer]) -> Answer:
    """Have the device thread do something, and wait for what it answers."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Answer] = loop.create_future()

    def call() -> None:
        loop.call_soon_threadsafe(done.set_result, act())

    engine.worker.queue.post(call)
    return await done


async def go_cold(engine: Engine, name: str = "s") -> Session:
    """A session, taken off the device; one that is loading, for somebody who has gone since, once that is over."""
    session = session_of(engine, name)

    def offload() -> bool:
        if session.resident.state == "loading":
            return False
        engine.worker.cache.offload(session.resident)
        return True

    if await on_device_thread(engine, offload):
        return session
    await asyncio.sleep(0.001)
    return await go_cold(engine, name)


def publish(engine: Engine, resident: Resident, new: Block, first_position: int) -> None:
    """Let readers see tokens, as the store's thread does once they are on disk."""
    if resident.publish(new, first_position):
        engine.worker.fill(resident)
