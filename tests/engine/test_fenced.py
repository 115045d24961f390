"""An engine whose data another server has taken."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from htm_service.errors import Unhealthy
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from storage.base import DEFAULT_NAMESPACE
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.names import named


async def test_it_refuses_everything_from_the_first_write_on(make_engine: MakeEngine, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/htm.sqlite3"
    engine = await make_engine(open_store(url))
    await engine.create(named("a"), CreateRequest(dim=3))
    tokens = np.ones((2, 3), np.float32)
    await engine.append(named("a"), AppendRequest(embeddings=tokens))
    (tmp_path / "htm.sqlite3.lock").unlink()
    other = open_store(url)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: engine.append(named("a"), AppendRequest(embeddings=tokens)),
        lambda: engine.attend(named("a"), AttendRequest(queries=tokens)),
        lambda: engine.inspect(named("a")),
        lambda: engine.recalls(named("a")),
        lambda: engine.list_sessions(DEFAULT_NAMESPACE),
        lambda: engine.create(named("a"), CreateRequest(dim=3)),
        lambda: engine.delete(named("a")),
    ]
    for call in calls:
        with pytest.raises(Unhealthy, match="another server owns this data since"):
            await call()
    assert "another server owns" in (engine.unhealthy_reason() or "")
    row = other.get_session(named("a"))
    assert row is not None and row.length == 2
    other.close()
