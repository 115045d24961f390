"""Engines for tests: made by a factory, closed at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from storage.base import Store
from storage.resolve import open_store
from tests.databases import new_database

MakeEngine = Callable[..., Awaitable[Engine]]


@pytest.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    """`await make_engine(store=..., **config)`: a running engine over `store`, in memory when none is given."""
    engines: list[tuple[Engine, Store]] = []

    async def make(store: Store | None = None, **config: Any) -> Engine:
        store = store or open_store("memory://")
        engine = Engine(EngineConfig(device="cpu", **config), store)
        await engine.start()
        engines.append((engine, store))
        return engine

    yield make
    for engine, store in engines:
        await engine.close()
        store.close()


@pytest.fixture
async def engine(make_engine: MakeEngine) -> Engine:
    return await make_engine()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return new_database(tmp_path / "htm.sqlite3")
