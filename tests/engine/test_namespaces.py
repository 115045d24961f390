"""Two namespaces of one engine share a device, a store and ids, and nothing else."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.errors import SessionExpired, SessionNotFound
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SessionKey
from storage.base import Store
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, vectors
from tests.engine.test_expiry import Clock

QUERY = AttendRequest(queries=vectors(9, 1, DIM), payloads=True)
KEYS = SessionKey("ours", "s"), SessionKey("theirs", "s")


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, sqlite_url: str) -> Store:
    return open_store(sqlite_url if request.param == "sqlite" else "memory://")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def engine(store: Store, clock: Clock) -> AsyncIterator[Engine]:
    engine = Engine(EngineConfig(device="cpu", expiry_interval_s=3600), store, clock=clock)
    await engine.start()
    yield engine
    await engine.close()
    store.close()


async def fill(engine: Engine) -> None:
    """A session of each key: other tokens, payloads and lengths under the same id, appended with the same key."""
    for number, key in enumerate(KEYS, start=1):
        await engine.create(
            key, CreateRequest(dim=DIM, chunk_size=2, labels={"of": key.namespace}, ttl_s=3600 * number)
        )
        payloads = [b'"%s"' % key.namespace.encode()] * number
        tokens = AppendRequest(embeddings=vectors(number, number, DIM), payloads=payloads, idempotency_key="k")
        assert (await engine.append(key, tokens)).length == number


async def test_an_id_names_another_session_in_each(engine: Engine, make_engine: MakeEngine, store: Store) -> None:
    await fill(engine)
    for running in (engine, await make_engine(store)):  # known ones, and found in the store
        for number, key in enumerate(KEYS, start=1):
            read = await running.read(key, 0, None, embeddings=True, payloads=True)
            np.testing.assert_array_equal(read.embeddings, vectors(number, number, DIM))
            answer = await running.attend(key, QUERY)
            assert answer.length == number and answer.recalled is not None
            assert {token.payload for token in answer.recalled[0]} == {b'"%s"' % key.namespace.encode()}
            assert len(await running.recalls(key)) == 1


async def test_nothing_of_another_namespace_is_listed_or_counted(engine: Engine) -> None:
    await fill(engine)
    await engine.create(SessionKey("theirs", "t"), CreateRequest(dim=DIM))
    first = await engine.list_sessions("theirs", limit=1)
    rest = await engine.list_sessions("theirs", cursor=first.cursor)
    assert [info.id for info in (*first.sessions, *rest.sessions)] == ["s", "t"] and rest.cursor is None
    assert [info.id for info in (await engine.list_sessions("ours", cursor=first.cursor)).sessions] == []
    assert (await engine.list_sessions("theirs", labels={"of": "ours"})).sessions == []
    assert (await engine.info("ours")).totals == {"sessions": 1, "tokens": 1, "stored_bytes": DIM * 4}
    assert (await engine.info("nobody")).totals == {"sessions": 0, "tokens": 0, "stored_bytes": 0}
    assert (await engine.info()).totals["sessions"] == 3


@pytest.mark.parametrize("gone", [0, 1])
async def test_one_goes_and_the_other_stays(engine: Engine, gone: int) -> None:
    await fill(engine)
    await engine.delete(KEYS[gone])
    with pytest.raises(SessionNotFound, match=r"there is no session 's'$"):
        await engine.inspect(KEYS[gone])
    assert (await engine.attend(KEYS[1 - gone], QUERY)).length == 2 - gone
    made = await asyncio.gather(*(engine.create(KEYS[gone], CreateRequest(dim=DIM)) for _ in range(7)))
    assert sum(is_new for _, is_new in made) == 1


async def test_one_expires_and_the_other_stays(engine: Engine, store: Store, clock: Clock) -> None:
    await fill(engine)
    clock.now += 5_000
    await engine.expiry.expire()
    with pytest.raises(SessionExpired):
        await engine.inspect(KEYS[0])
    with pytest.raises(SessionNotFound):
        await engine.inspect(SessionKey("nobody", "s"))
    assert (await engine.inspect(KEYS[1])).length == 2
    assert [row.key for row in store.list_sessions()] == [KEYS[1]]
