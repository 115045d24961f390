"""Callers' keys: refused everywhere within a second of being taken back, and when it is not known whether they were."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.errors import Unhealthy
from htm_service.records import KeyWish
from htm_service.writes import keys as module
from htm_service.writes.keys import Keys, digest_of
from storage.base import KeyRow, Store, StoreError
from storage.resolve import open_store
from tests.engine.test_expiry import Clock

WISH = KeyWish(name="k", role="write", namespace="default")


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, sqlite_url: str) -> Store:
    return open_store(sqlite_url if request.param == "sqlite" else "memory://")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def engine(store: Store, clock: Clock) -> AsyncIterator[Engine]:
    engine = Engine(EngineConfig(device="cpu"), store, clock=clock)
    await engine.start()
    yield engine
    await engine.close()
    store.close()


@pytest.fixture
async def elsewhere(engine: Engine, store: Store, clock: Clock) -> AsyncIterator[Keys]:
    """The keys of another server of the store."""
    keys = Keys(store, engine.committer.write, clock)
    await keys.read()
    running = asyncio.create_task(keys.run())
    yield keys
    running.cancel()


async def test_another_server_learns_of_keys(engine: Engine, elsewhere: Keys) -> None:
    """One that was just made at once, one that was taken back within a second."""
    _, secret = await engine.create_key(WISH)
    assert elsewhere.find(digest_of(secret)) is None
    await asyncio.sleep(module.UNKNOWN_S)
    found = await elsewhere.find_again(digest_of(secret))
    assert found is not None and (found.name, found.role) == ("k", "write") and elsewhere.are_asked_for
    await engine.revoke_key("default", "k")
    began = time.monotonic()
    assert engine.keys.find(digest_of(secret)) is None and await engine.keys.find_again(digest_of(secret)) is None
    while elsewhere.find(digest_of(secret)) is not None:
        await asyncio.sleep(0.01)
        assert time.monotonic() - began < 1.0
    assert elsewhere.are_asked_for, "that none is left lets nobody in"


async def test_a_key_expires_by_the_steady_clock(engine: Engine, clock: Clock) -> None:
    _, secret = await engine.create_key(KeyWish(name="k", role="read", namespace="default", expires_in_s=60))
    clock.now += 59.5
    assert engine.keys.find(digest_of(secret)) is not None
    clock.now += 0.5
    assert engine.keys.find(digest_of(secret)) is None and await engine.keys.find_again(digest_of(secret)) is None


async def test_guesses_cost_the_store_little(engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read, list_keys = 0, store.list_keys

    def counting() -> list[KeyRow]:
        nonlocal num_read
        num_read += 1
        return list_keys()

    monkeypatch.setattr(store, "list_keys", counting)
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        guesses = (b"htm_%d" % number for number in range(9))
        assert not any(await asyncio.gather(*map(engine.keys.find_again, guesses)))
    took = time.monotonic() - began
    assert 1 <= num_read <= 2 + took / module.UNKNOWN_S + took / module.REFRESH_S


async def test_a_store_that_cannot_be_read_opens_nothing(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether a key was taken back is not known then: after some seconds it counts no more."""
    _, secret = await engine.create_key(WISH)

    def failing() -> list[KeyRow]:
        raise StoreError("no answer")

    monkeypatch.setattr(store, "list_keys", failing)
    monkeypatch.setattr(module, "STALE_S", 0.3)
    assert engine.keys.find(digest_of(secret)) is not None
    await asyncio.sleep(0.8)
    with pytest.raises(Unhealthy, match="cannot be read from the store"):
        engine.keys.find(digest_of(secret))
    assert await engine.keys.find_again(b"htm_other") is None
    assert "no answer" in caplog.text and secret not in caplog.text
    monkeypatch.undo()
    await engine.list_keys(None)
    assert engine.keys.find(digest_of(secret)) is not None


async def test_the_last_use_is_written_down(store: Store, clock: Clock) -> None:
    engine = Engine(EngineConfig(device="cpu"), store, clock=clock)
    await engine.start()
    _, secret = await engine.create_key(WISH)
    clock.now += 7
    engine.keys.find(digest_of(secret))
    await engine.close()
    (row,) = store.list_keys()
    assert row.last_used_at == clock.now and secret.encode() not in row.digest
    store.close()


async def test_names_are_a_namespaces_own(engine: Engine) -> None:
    secrets = {}
    for namespace in ("default", "other", "*"):
        _, secrets[namespace] = await engine.create_key(KeyWish(name="k", role="read", namespace=namespace))
    assert [key.namespace for key in await engine.list_keys(None)] == ["*", "default", "other"]
    assert [key.namespace for key in await engine.list_keys("other")] == ["other"]
    await engine.revoke_key("other", "k")
    left = {name for name, secret in secrets.items() if engine.keys.find(digest_of(secret)) is not None}
    assert left == {"default", "*"}
    assert len(set(secrets.values())) == 3 and all(
        secret.isascii() and secret[4:].isalnum() for secret in secrets.values()
    )
