"""A store that fails under the engine: the session it concerns says so, the others go on."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from htm_service.errors import Unhealthy
from htm_service.records import AttendRequest
from storage.base import StoreDamaged, StoreError
from storage.memory import MemoryStore
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, fill, vectors

QUERY = AttendRequest(queries=vectors(1, 1, DIM), payloads=True)


async def test_a_damaged_session_fails_alone(make_engine: MakeEngine, monkeypatch: Any) -> None:
    store = MemoryStore()
    first = await make_engine(store)
    await fill(first, "bad", vectors(1, 9, DIM))
    await fill(first, "good", vectors(2, 9, DIM))
    engine = await make_engine(store)  # both are cold here
    bad = store.get_session("bad")
    assert bad is not None
    read_blocks = store.read_blocks

    def damaged(sid: int, *args: Any) -> Any:
        if sid == bad.sid:
            raise StoreDamaged("session 'bad' is damaged at position 0")
        return read_blocks(sid, *args)

    monkeypatch.setattr(store, "read_blocks", damaged)
    for _ in range(2):
        with pytest.raises(Unhealthy, match=r"'bad' cannot be read: .* damaged at position 0"):
            await engine.attend("bad", QUERY)
    with pytest.raises(Unhealthy, match="cannot be read"):
        await engine.read("bad", 0, None, embeddings=True, payloads=False)
    assert (await engine.attend("good", QUERY)).length == 9
    assert engine.unhealthy_reason() is None


@pytest.mark.parametrize("method", ["get_session", "list_sessions", "read_payloads", "read_payload_range"])
async def test_errors_of_the_store_are_the_domains(make_engine: MakeEngine, monkeypatch: Any, method: str) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    await fill(engine, "s", vectors(1, 9, DIM))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise StoreError("the database is locked")

    monkeypatch.setattr(store, method, fail)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "get_session": lambda: engine.inspect("other"),
        "list_sessions": lambda: engine.list_sessions(),
        "read_payloads": lambda: engine.attend("s", QUERY),
        "read_payload_range": lambda: engine.chunk("s", 0),
    }
    with pytest.raises(Unhealthy, match="the database is locked"):
        await calls[method]()


async def test_gaps_and_missing_tokens_are_found_when_loading(make_engine: MakeEngine, monkeypatch: Any) -> None:
    store = MemoryStore()
    first = await make_engine(store)
    await fill(first, "s", vectors(1, 9, DIM))
    engine = await make_engine(store)
    row = store.get_session("s")
    assert row is not None
    (block,) = store.read_blocks(row.sid)
    monkeypatch.setattr(store, "read_blocks", lambda *args: iter(()))
    with pytest.raises(Unhealthy, match="0 of 9 tokens are stored"):
        await engine.attend("s", QUERY)
    gap = replace(block, start=3, episode=1)
    monkeypatch.setattr(store, "read_blocks", lambda *args: iter((block, gap)))
    with pytest.raises(Unhealthy, match="tokens from 3 on do not follow 9"):
        await engine.attend("s", QUERY)
    monkeypatch.undo()
    assert (await engine.attend("s", QUERY)).length == 9
