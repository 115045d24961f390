"""A store that fails under the engine: the session it concerns says so, the others go on."""

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from htm_service.engine import Engine
from htm_service.errors import SessionDamaged, SessionNotFound, Unhealthy
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from htm_service.session_settings import wrong_with
from storage.base import DEFAULT_NAMESPACE, StoreDamaged, StoreError
from storage.in_memory import MemoryStore
from storage.resolve import open_for_repair, open_store
from storage.sql.store import SqlStore
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, fill, vectors
from tests.names import named

QUERY = AttendRequest(queries=vectors(1, 1, DIM), payloads=True)


async def test_a_damaged_session_fails_alone(make_engine: MakeEngine, monkeypatch: Any) -> None:
    store = MemoryStore()
    first = await make_engine(store)
    await fill(first, "bad", vectors(1, 9, DIM))
    await fill(first, "good", vectors(2, 9, DIM))
    engine = await make_engine(store)  # both are cold here
    bad = store.get_session(named("bad"))
    assert bad is not None
    read_blocks = store.read_blocks

    def damaged(sid: int, *args: Any) -> Any:
        if sid == bad.sid:
            raise StoreDamaged("session 'bad' is damaged at position 0")
        return read_blocks(sid, *args)

    monkeypatch.setattr(store, "read_blocks", damaged)
    for _ in range(2):
        with pytest.raises(SessionDamaged, match=r"'bad' is damaged at position 0"):
            await engine.attend(named("bad"), QUERY)
    with pytest.raises(SessionDamaged, match="'bad' is damaged at position 0"):
        await engine.read(named("bad"), 0, None, embeddings=True, payloads=False)
    with pytest.raises(SessionDamaged, match="takes no more appends"):
        await engine.append(named("bad"), AppendRequest(embeddings=vectors(3, 1, DIM)))
    with pytest.raises(SessionDamaged, match="takes no more appends"):
        await engine.step(named("bad"), QUERY, AppendRequest(embeddings=vectors(3, 1, DIM)))
    infos = {info.id: info.damage for info in (await engine.list_sessions(DEFAULT_NAMESPACE)).sessions}
    assert infos == {"bad": "session 'bad' is damaged at position 0", "good": None}
    assert (await engine.info()).totals["damaged_sessions"] == 1
    await engine.append(named("good"), AppendRequest(embeddings=vectors(3, 1, DIM)))
    assert (await engine.attend(named("good"), QUERY)).length == 10
    await engine.delete(named("bad"))
    assert engine.unhealthy_reason() is None


@pytest.mark.parametrize("method", ["get_session", "list_sessions", "read_payloads", "read_payload_range", "totals"])
async def test_errors_of_the_store_are_the_domains(make_engine: MakeEngine, monkeypatch: Any, method: str) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    await fill(engine, "s", vectors(1, 9, DIM))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise StoreError("the database is locked")

    monkeypatch.setattr(store, method, fail)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "get_session": lambda: engine.inspect(named("other")),
        "list_sessions": lambda: engine.list_sessions(DEFAULT_NAMESPACE),
        "read_payloads": lambda: engine.attend(named("s"), QUERY),
        "read_payload_range": lambda: engine.chunk(named("s"), 0),
        "totals": engine.info,
    }
    with pytest.raises(Unhealthy, match="the database is locked"):
        await calls[method]()


async def test_gaps_and_missing_tokens_are_found_when_loading(make_engine: MakeEngine, monkeypatch: Any) -> None:
    store = MemoryStore()
    first = await make_engine(store)
    await fill(first, "s", vectors(1, 9, DIM))
    engine = await make_engine(store)
    row = store.get_session(named("s"))
    assert row is not None
    (block,) = store.read_blocks(row.sid)
    monkeypatch.setattr(store, "read_blocks", lambda *args: iter(()))
    with pytest.raises(Unhealthy, match="0 of 9 tokens are stored"):
        await engine.attend(named("s"), QUERY)
    gap = block._replace(start=3, episode=1)
    monkeypatch.setattr(store, "read_blocks", lambda *args: iter((block, gap)))
    with pytest.raises(Unhealthy, match="tokens from 3 on do not follow 9"):
        await engine.attend(named("s"), QUERY)
    monkeypatch.undo()
    assert (await engine.attend(named("s"), QUERY)).length == 9


@pytest.mark.parametrize("lost", [0, 2])
async def test_a_lost_row_is_its_sessions_trouble(
    make_engine: MakeEngine, sqlite_url: str, tmp_path: Path, lost: int
) -> None:
    """Bug: the session that had gone on after it was answered 503 for ever, or with tokens of other positions."""
    first = await make_engine(open_store(sqlite_url))
    for name in ("bad", "good"):
        await fill(first, name, vectors(1, 2, DIM))
        await first.append(named(name), AppendRequest(embeddings=vectors(2, 1, DIM)))
        await first.append(named(name), AppendRequest(embeddings=vectors(3, 1, DIM)))
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    left = tmp_path / "left"
    left.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(path.with_name(path.name + suffix), left)
    with contextlib.closing(sqlite3.connect(left / path.name)) as connection, connection:
        bad = "(SELECT sid FROM sessions WHERE id = 'bad')"
        connection.execute(f"DELETE FROM blocks WHERE log = {bad} AND start = ?", [lost])
    engine = await make_engine(open_store(f"sqlite:///{left / path.name}"))
    with pytest.raises(SessionDamaged, match="'bad' is damaged at position"):
        await engine.attend(named("bad"), QUERY)
    assert (await engine.attend(named("good"), QUERY)).length == 4


SETTINGS = [
    ("'[1'", "they are no JSON object"),
    ("replace(settings, 'labels', 'lacels')", "they lack labels"),
    ('replace(settings, \'{"dim"\', \'{"x": 1, "dim"\')', "they have the unknown 'x'"),
    ("replace(settings, 'float32', 'float72')", "their dtype is 'float72'"),
    ("replace(settings, '\"float32\"', '[]')", "their dtype is []"),
]
"""What is done to settings in the store, and what `verify` says of it."""


async def with_damage(make_engine: MakeEngine, url: str, damage: str) -> tuple[SqlStore, Engine]:
    """Sessions `bad`, with these settings, and `good`."""
    with contextlib.closing(open_store(url)) as store:
        first = await make_engine(store)
        for name in ("bad", "good"):
            await fill(first, name, vectors(1, 9, DIM), ttl_s=1e6)
        await first.close()
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(f"UPDATE sessions SET settings = {damage} WHERE id = 'bad'")
    again = open_store(url)
    assert isinstance(again, SqlStore)
    return again, await make_engine(again)


@pytest.mark.parametrize("damage", [damage for damage, _ in SETTINGS])
async def test_damaged_settings_are_one_sessions_trouble(make_engine: MakeEngine, sqlite_url: str, damage: str) -> None:
    """They once made every list, and with it the expiry of sessions, fail."""
    _, engine = await with_damage(make_engine, sqlite_url, damage)
    with pytest.raises(SessionDamaged, match="'bad' is damaged: its settings cannot be read"):
        await engine.attend(named("bad"), QUERY)
    assert [info.id for info in (await engine.list_sessions(DEFAULT_NAMESPACE)).sessions] == ["good"]
    await engine.expiry.expire()
    assert (await engine.attend(named("good"), QUERY)).length == 9


@pytest.mark.parametrize("damage", [damage for damage, _ in SETTINGS])
async def test_a_session_of_damaged_settings_can_be_deleted(
    make_engine: MakeEngine, sqlite_url: str, damage: str
) -> None:
    """Bug: its deletion was answered 409 too, so nothing but `repair` could end it."""
    store, engine = await with_damage(make_engine, sqlite_url, damage)
    await asyncio.gather(engine.delete(named("bad")), engine.attend(named("good"), QUERY))
    for call in (engine.delete(named("bad")), engine.inspect(named("bad"))):
        with pytest.raises(SessionNotFound):
            await call
    totals = store.totals()
    assert (totals.num_sessions, totals.num_tokens) == (1, 9)
    assert list(store.verify(wrong_with)) == []
    await engine.create(named("bad"), CreateRequest(dim=DIM))
    assert (await engine.inspect(named("bad"))).length == 0


async def test_one_of_two_deletions_of_damaged_settings_finds_nothing(make_engine: MakeEngine, sqlite_url: str) -> None:
    _, engine = await with_damage(make_engine, sqlite_url, SETTINGS[0][0])
    outcomes = await asyncio.gather(engine.delete(named("bad")), engine.delete(named("bad")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), SessionNotFound]


@pytest.mark.parametrize(("damage", "why"), SETTINGS)
async def test_damaged_settings_are_found_and_repaired(
    make_engine: MakeEngine, sqlite_url: str, damage: str, why: str
) -> None:
    """Bug: `verify` only looked whether they are JSON, and the server refused what it had passed."""
    served, engine = await with_damage(make_engine, sqlite_url, damage)
    await engine.close()
    served.close()
    with contextlib.closing(open_for_repair(sqlite_url)) as store:
        (problem,) = store.verify(wrong_with)
        assert (problem.session, problem.message) == (named("bad"), f"its settings cannot be read: {why}")
        (repair,) = store.plan_repair(wrong_with)
        assert repair.message == f"all of it, 9 tokens, because its settings cannot be read: {why}"
        store.carry_out_repair([repair])
        assert list(store.verify(wrong_with)) == []
