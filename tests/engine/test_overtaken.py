"""Calls that a deletion overtakes, or one and a session made anew under the same id: not found, and nothing half."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from htm_service.engine import Engine
from htm_service.errors import SessionNotFound
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SearchRequest
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold
from tests.engine.test_attend import DIM, SIZE, vectors
from tests.names import named

ATTEND = AttendRequest(queries=vectors(1, 1, DIM), payloads=True)
APPEND = AppendRequest(embeddings=vectors(2, 1, DIM))
CALLS: dict[str, tuple[str, Callable[[Engine], Awaitable[Any]]]] = {
    "attend": ("read_payloads_each", lambda engine: engine.attend(named("s"), ATTEND)),
    "step": ("read_payloads_each", lambda engine: engine.step(named("s"), ATTEND, APPEND)),
    "search": ("read_payloads_each", lambda engine: engine.search(named("s"), SearchRequest(ATTEND.queries))),
    "read": ("read_payload_range", lambda engine: engine.read(named("s"), 0, None, embeddings=True, payloads=True)),
    "payloads": (
        "read_payload_range",
        lambda engine: engine.read(named("s"), 0, None, embeddings=False, payloads=True),
    ),
    "embeddings": ("read_blocks", lambda engine: engine.read(named("s"), 0, None, embeddings=True, payloads=False)),
    "chunk": ("read_payload_range", lambda engine: engine.chunk(named("s"), 0)),
    "load": ("read_blocks", lambda engine: engine.attend(named("s"), AttendRequest(queries=ATTEND.queries))),
    "load chunks": ("read_blocks", lambda engine: engine.chunks(named("s"))),
    "load keys": ("read_summaries", lambda engine: engine.chunks(named("s"))),
}
"""What reads twice, and its second read."""


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("call", CALLS)
async def test_what_a_deletion_overtakes_is_not_found(
    make_engine: MakeEngine, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, call: str, anew: bool
) -> None:
    """An attend answered 200 with payloads of null, which is promised for trimmed tokens only."""
    store = open_store(sqlite_url)
    engine = await make_engine(store, payload_cache_bytes=0)  # payloads in memory need no second read
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
    await engine.append(named("s"), AppendRequest(vectors(0, 9, DIM), payloads=[b'{"i": 1}'] * 9))
    if call.startswith("load"):
        await go_cold(engine)
    method, ask = CALLS[call]
    read, loop, caller = getattr(store, method), asyncio.get_running_loop(), threading.current_thread()

    async def overtake() -> None:
        await engine.delete(named("s"))
        if anew:
            await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
            await engine.append(named("s"), AppendRequest(vectors(0, 2, DIM)))

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        assert threading.current_thread() is not caller
        asyncio.run_coroutine_threadsafe(overtake(), loop).result(timeout=60)
        return read(*args)

    monkeypatch.setattr(store, method, late)
    with pytest.raises(SessionNotFound, match="there is no session 's'"):
        await ask(engine)
    if anew:
        assert (await engine.inspect(named("s"))).length == 2
    assert engine.unhealthy_reason() is None


async def test_payloads_that_there_never_were_are_none(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await engine.create(named("s"), CreateRequest(dim=DIM))
    await engine.append(named("s"), AppendRequest(vectors(0, 2, DIM), payloads=[None, b'{"i": 1}']))
    (row,) = (await engine.attend(named("s"), ATTEND)).recalled or ()
    assert {token.position: token.payload for token in row} == {0: None, 1: b'{"i": 1}'}
