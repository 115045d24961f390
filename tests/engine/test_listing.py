"""Sessions listed by last use, deleted by label, and what happens to them told to who reads along."""

from typing import Any

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.errors import Draining, InvalidArgument
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SessionChange
from storage.base import DEFAULT_NAMESPACE
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.names import named

TOKENS = np.eye(3, dtype=np.float32)


async def create(engine: Engine, *names: str, **labels: str) -> None:
    for name in names:
        await engine.create(named(name), CreateRequest(dim=3, chunk_size=2, labels=labels))


async def listed(engine: Engine, limit: int = 100, **which: Any) -> list[str]:
    """All pages of a listing by last use."""
    names: list[str] = []
    cursor = None
    while True:
        page = await engine.list_sessions(DEFAULT_NAMESPACE, cursor=cursor, limit=limit, by_use=True, **which)
        names += [info.id for info in page.sessions]
        assert len(page.sessions) <= limit
        if (cursor := page.cursor) is None:
            return names


async def test_last_used_first_then_those_that_nobody_used(sqlite_url: str, make_engine: MakeEngine) -> None:
    engine = await make_engine(open_store(sqlite_url))
    await create(engine, *"abcdefg", team="red")
    await create(engine, *"xyz", team="blue")
    await engine.inspect(named("b"))
    await engine.append(named("f"), AppendRequest(TOKENS))
    order = list("fbzyxgedca")
    for limit in (1, 2, 3, 100):
        assert await listed(engine, limit) == order
    assert await listed(engine, 1, labels={"team": "blue"}) == list("zyx")
    assert await listed(engine, prefix="f") == ["f"]
    await engine.close()
    engine.store.close()
    again = await make_engine(open_store(sqlite_url))
    await again.attend(named("d"), AttendRequest(queries=TOKENS[0]))
    await again.attend(named("y"), AttendRequest(queries=TOKENS[0]))
    for limit in (1, 2, 5, 100):
        assert await listed(again, limit) == list("ydabcefgxz")
    assert await listed(again, 1, labels={"team": "red"}) == list("dabcefg")


async def test_a_cursor_of_the_other_order_is_refused(engine: Engine) -> None:
    await create(engine, *"abc")
    by_id = (await engine.list_sessions(DEFAULT_NAMESPACE, limit=1)).cursor
    with pytest.raises(InvalidArgument, match="which no listing gave out"):
        await engine.list_sessions(DEFAULT_NAMESPACE, cursor=by_id, by_use=True)


async def test_all_of_a_label_are_deleted_from_every_tier(make_store_url: str, make_engine: MakeEngine) -> None:
    engine = await make_engine(open_store(make_store_url))
    await create(engine, *(f"ana{number}" for number in range(450)), user="ana")
    await create(engine, "ben", "ana-of-ben", user="ben")
    await engine.append(named("ana7"), AppendRequest(TOKENS))
    await engine.attend(named("ana7"), AttendRequest(queries=TOKENS[0]))
    assert await engine.delete_sessions(DEFAULT_NAMESPACE, labels={"user": "ana"}) == 450
    assert await engine.delete_sessions(DEFAULT_NAMESPACE, labels={"user": "ana"}) == 0
    assert [info.id for info in (await engine.list_sessions(DEFAULT_NAMESPACE)).sessions] == ["ana-of-ben", "ben"]
    totals = (await engine.info()).totals
    assert totals["sessions"] == 2 and totals["device_bytes"] == totals["tokens"] == 0
    assert await engine.delete_sessions(DEFAULT_NAMESPACE, "ana", {"user": "ben"}) == 1
    assert await engine.delete_sessions(DEFAULT_NAMESPACE, "b") == 1


@pytest.fixture(params=["sqlite", "memory"])
def make_store_url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    return sqlite_url if request.param == "sqlite" else "memory://"


async def test_what_to_delete_must_be_said(engine: Engine) -> None:
    await create(engine, "a")
    wrong: list[dict[str, Any]] = [{}, {"prefix": ""}, {"labels": {}}, {"prefix": "a b"}, {"labels": {"k" * 300: "v"}}]
    for which in wrong:
        with pytest.raises(InvalidArgument):
            await engine.delete_sessions(DEFAULT_NAMESPACE, **which)
    assert len((await engine.list_sessions(DEFAULT_NAMESPACE)).sessions) == 1


async def test_what_happens_is_told(engine: Engine) -> None:
    reader = engine.listen(DEFAULT_NAMESPACE, "a")
    await create(engine, "a", "b")
    await engine.append(named("a"), AppendRequest(TOKENS, idempotency_key="k"))
    await engine.append(named("a"), AppendRequest(TOKENS, idempotency_key="k"))  # repeated: nothing happens
    await engine.attend(named("a"), AttendRequest(queries=TOKENS[0], note="why?"))
    await engine.explain(named("a"), AttendRequest(queries=TOKENS[0]))
    await engine.update(named("a"), SessionChange(labels={"user": "ana"}))
    await engine.delete_sessions(DEFAULT_NAMESPACE, labels={"user": "ana"})
    events, num_dropped = await reader.take(1)
    assert [event.kind for event in events] == ["session", "append", "recall", "session", "session"]
    assert num_dropped == 0 and events[0].what == "created" and events[-1].what == "deleted"
    assert events[2].what.note == "why?" and events[1].what.length == 3  # type: ignore[union-attr]
    reader.close()
    reader = engine.listen(DEFAULT_NAMESPACE, "b")
    await engine.append(named("b"), AppendRequest(TOKENS))
    await reader.take(1)
    await engine.attend(named("b"), AttendRequest(queries=TOKENS[0], note="nothing comes after"))
    events, _ = await reader.take(1)
    assert [event.kind for event in events] == ["recall"]
    reader.close()
    engine.is_draining = True
    with pytest.raises(Draining):
        engine.listen(DEFAULT_NAMESPACE)
    engine.is_draining = False
