"""Searches of many sessions at once: each is what a search of its own is, and fails alone."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from htm_service.errors import DeadlineExceeded, HTMError, InvalidArgument, SessionNotFound
from htm_service.records import CreateRequest, SearchAllResult, SearchRequest, SearchResult
from storage.in_memory import MemoryStore
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold
from tests.engine.test_attend import vectors
from tests.engine.test_search import DIM, check, fill, random_search, visible_of
from tests.names import named


def outcome_of(outcome: SearchResult | HTMError) -> str:
    return outcome.code if isinstance(outcome, HTMError) else "ok"


@pytest.mark.parametrize("limits", [{}, {"max_batch_products": 4 << 20}, {"payload_cache_bytes": 0}], ids=str)
async def test_each_is_what_a_search_of_its_own_is(make_engine: MakeEngine, limits: dict[str, Any]) -> None:
    draw = np.random.default_rng(9)
    engine = await make_engine(**limits)
    tokens = {f"s{number}": vectors(number, int(draw.integers(1, 600)), DIM) for number in range(5)}
    for name, rows in tokens.items():
        await fill(engine, name, rows)
    for _ in range(6):
        names = [f"s{number}" for number in draw.integers(0, 5, 20)]
        wanted = [(named(name), random_search(draw, len(tokens[name]), exact=True)) for name in names]
        for name, (_, request), outcome in zip(names, wanted, await engine.batch_search(wanted), strict=True):
            assert isinstance(outcome, SearchResult)
            check(outcome, tokens[name], request, visible_of(len(tokens[name]), request))
            assert (outcome.payloads is None) == (not request.payloads)


async def test_items_fail_alone(make_engine: MakeEngine) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    for name in "abc":
        await fill(engine, name, vectors(1, 90, DIM))
    await engine.create(named("narrow"), CreateRequest(dim=3))
    query = SearchRequest(vectors(2, 1, DIM), num_wanted=4, timeout_s=0.4)
    items = [
        (named("a"), query),
        (named("nobody"), query),
        (named("narrow"), query),
        (named("b"), SearchRequest(vectors(2, 1, DIM), model="nothing")),
        (named("b"), SearchRequest(vectors(2, 1, DIM), stop=91)),
        (named("c"), SearchRequest(vectors(2, 1, DIM), mask=np.ones(3, np.bool_))),
        (named("c"), query),
    ]
    found = await engine.batch_search(items)
    argument = "invalid_argument"
    assert list(map(outcome_of, found)) == [
        *("ok", "session_not_found", argument, "model_not_found", argument, argument, "ok"),
    ]
    slow = await go_cold(engine, "b")
    may_go, read_blocks = threading.Event(), store.read_blocks
    store.read_blocks = lambda sid, *args: (sid == slow.sid and may_go.wait(20), read_blocks(sid, *args))[1]  # type: ignore[method-assign]
    try:
        found = await engine.batch_search([(named(name), query) for name in "abc"])
    finally:
        may_go.set()
    assert list(map(outcome_of, found)) == ["ok", "deadline_exceeded", "ok"]


async def test_an_answer_that_would_be_too_large_is_refused_as_a_whole_or_from_where_it_is(
    make_engine: MakeEngine,
) -> None:
    engine = await make_engine(max_answer_bytes=6_000, payload_cache_bytes=1 << 20)
    await fill(engine, "s", vectors(1, 90, DIM))
    one = SearchRequest(vectors(2, 1, DIM), num_wanted=30, exact=True)
    with pytest.raises(InvalidArgument, match="the answer to 3 searches has up to 8280 bytes, the limit of one answer"):
        await engine.batch_search([(named("s"), one)] * 3)
    assert list(map(outcome_of, await engine.batch_search([(named("s"), one)] * 2))) == ["ok", "ok"]
    with pytest.raises(InvalidArgument):
        await asyncio.gather(engine.batch_search([(named("s"), SearchRequest(vectors(2, 4, DIM), num_wanted=30))]))


@pytest.mark.parametrize("what", ["read_blocks", "read_payloads_each"])
async def test_a_session_deleted_while_those_of_a_label_are_searched_is_left_out(
    make_engine: MakeEngine, what: str
) -> None:
    """The search was answered 404 for a session that its caller had not named."""
    store = MemoryStore()
    engine = await make_engine(store, payload_cache_bytes=0)
    for name in "abc":
        await fill(engine, name, vectors(ord(name), 90, DIM), labels={"user": "ana"})
    request = SearchRequest(vectors(2, 1, DIM), num_wanted=200, exact=True)
    await go_cold(engine, "b")
    may_go, reading, read = threading.Event(), threading.Event(), getattr(store, what)

    def read_late(*args: Any) -> Any:
        reading.set()
        may_go.wait(20)
        return read(*args)

    setattr(store, what, read_late)
    try:
        searches = [
            asyncio.create_task(engine.search_all("default", request, labels={"user": "ana"})),
            asyncio.create_task(engine.search_all("default", request, ["a", "b", "c"])),
        ]
        await asyncio.to_thread(reading.wait, 20)
        await engine.delete(named("b"))
    finally:
        may_go.set()
    found, named_too = await asyncio.gather(*searches, return_exceptions=True)
    assert isinstance(found, SearchAllResult), found
    assert list(found.sessions) == ["a", "c"] and len(found.best[0]) == 180
    assert {found.sessions[of] for of, _ in found.best[0]} == {"a", "c"}
    assert isinstance(named_too, SessionNotFound) and "'b'" in named_too.detail


async def test_a_search_through_many_sessions_is_bounded_and_has_one_deadline(make_engine: MakeEngine) -> None:
    """Each 64 sessions had a deadline of their own, and what all of them found was counted nowhere."""
    store = MemoryStore()
    engine = await make_engine(store, max_answer_bytes=1_700)
    names = [f"s{number}" for number in range(70)]
    for number, name in enumerate(names):
        await fill(engine, name, vectors(number, 5, DIM))
    with pytest.raises(
        InvalidArgument, match="what 1 queries find in 70 sessions has up to 1840 bytes, the limit of one"
    ):
        await engine.search_all("default", SearchRequest(vectors(2, 1, DIM), num_wanted=2), names)
    found = await engine.search_all("default", SearchRequest(vectors(2, 1, DIM), num_wanted=1), names)
    scores = [float((vectors(number, 5, DIM) @ vectors(2, 1, DIM)[0]).max()) for number in range(70)]
    assert found.best == [[(int(np.argmax(scores)), 0)]]
    await go_cold(engine, "s69")
    may_go, read_blocks = threading.Event(), store.read_blocks
    store.read_blocks = lambda sid, *args: (may_go.wait(20), read_blocks(sid, *args))[1]  # type: ignore[method-assign]
    try:
        with pytest.raises(DeadlineExceeded):
            await engine.search_all("default", SearchRequest(vectors(2, 1, DIM), num_wanted=1, timeout_s=0.3), names)
    finally:
        may_go.set()
