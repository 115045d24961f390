"""What tests of the engine do to its sessions from the side: find them, take them off the device, run ahead of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from htm_service.engine import Engine
from htm_service.memory.resident import Resident
from htm_service.sessions.session import Session
from storage.base import Block


def session_of(engine: Engine, name: str) -> Session:
    """A session that was used since the start."""
    (session,) = [session for session in engine.directory.sessions() if session.id == name]
    return session


async def on_device_thread(engine: Engine, act: Callable[[], object]) -> None:
    """Have the device thread do something, and wait for it."""
    done, loop = asyncio.Event(), asyncio.get_running_loop()

    def call() -> None:
        act()
        loop.call_soon_threadsafe(done.set)

    engine.worker.queue.post(call)
    await done.wait()


async def go_cold(engine: Engine, name: str = "s") -> Session:
    """A session, taken off the device."""
    session = session_of(engine, name)
    await on_device_thread(engine, lambda: engine.worker.cache.offload(session.resident))
    return session


def publish(engine: Engine, resident: Resident, new: Block, first_position: int) -> None:
    """Let readers see tokens, as the store's thread does once they are on disk."""
    if resident.publish(new, first_position):
        engine.worker.fill(resident)
