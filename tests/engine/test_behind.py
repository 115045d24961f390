"""`durability: memory`: acknowledged before it is on disk, seen by nobody before that, and no loss is silent."""

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.errors import (
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    LengthConflict,
    Overloaded,
    SessionNotFound,
    Unhealthy,
)
from htm_service.records import AppendRequest, CreateRequest
from htm_service.writes import behind
from storage.base import Append, Store, StoreError, StoreFull
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.engine.test_sessions import QUERY, right

TOKENS = vectors(1, 61, DIM)


class Gate:
    """Groups that hold appends wait here until it is open, then fail with `error` if there is one."""

    def __init__(self, store: Store) -> None:
        self._write = store.write
        self.opened = threading.Event()
        self.error: StoreError | None = None

    def write(self, writes: Any, *, now: float) -> Any:
        if any(isinstance(write, Append) for write in writes):
            assert self.opened.wait(30)
            if self.error is not None:
                raise self.error
        return self._write(writes, now=now)


@pytest.fixture
def store() -> Store:
    return MemoryStore()


@pytest.fixture
def gate(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(store)
    monkeypatch.setattr(store, "write", gate.write)
    yield gate
    gate.opened.set()


def quick(start: int, stop: int, **fields: Any) -> AppendRequest:
    return AppendRequest(embeddings=TOKENS[start:stop], durability="memory", **fields)


async def test_it_is_acknowledged_before_it_is_written_and_seen_after(
    make_engine: MakeEngine, store: Store, gate: Gate
) -> None:
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    for start in range(0, 30, 3):
        answer = await engine.append("s", quick(start, start + 3, payloads=[b"{}"] * 3))
        assert (answer.start, answer.length, answer.num_chunks) == (start, start + 3, -(-(start + 3) // SIZE))
    reads: list[Coroutine[Any, Any, Any]] = [
        engine.attend("s", QUERY),
        engine.inspect("s"),
        engine.chunks("s"),
        engine.chunk("s", 5),
        engine.read("s", 0, None, embeddings=True, payloads=True),
        engine.append("s", AppendRequest(embeddings=TOKENS[30:33])),
    ]
    tasks = [asyncio.ensure_future(read) for read in reads]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in tasks)
    gate.opened.set()
    attended, info, chunks, chunk, memories, appended = await asyncio.gather(*tasks)
    assert attended.length in (30, 33) and right(TOKENS[: attended.length], attended)
    assert info.length >= 30 and len(chunks.chunks) >= 6 and chunk.payloads == [b"{}"] * 5
    np.testing.assert_array_equal(memories.embeddings[:30], TOKENS[:30])
    assert (appended.start, appended.length) == (30, 33)


async def test_appends_of_both_kinds_and_steps_keep_the_order_of_their_acknowledgements(
    make_engine: MakeEngine, sqlite_url: str
) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    draw = np.random.default_rng(7)
    for name in "abc":
        await fill(engine, name, TOKENS[:0])

    async def grow(name: str) -> None:
        position = 0
        while position < 60:
            stop = min(60, position + int(draw.integers(1, 5)))
            request = quick(position, stop)._replace(durability="disk" if draw.random() < 0.3 else "memory")
            if draw.random() < 0.3:
                attended, answer = await engine.step(name, QUERY, request)
                assert attended.length == position and (not position or right(TOKENS[:position], attended))
            else:
                answer = await engine.append(name, request)
            assert (answer.start, answer.length) == (position, stop)
            position = stop

    await asyncio.gather(*map(grow, "abc"))
    await engine.close()  # what was acknowledged and is not written yet is written now
    store.close()
    reopened = await make_engine(open_store(sqlite_url))
    for name in "abc":
        assert right(TOKENS[:60], await reopened.attend(name, QUERY))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"if_length": 3}, LengthConflict),
        ({"embeddings": vectors(2, 28, DIM)}, InvalidArgument),
        ({"idempotency_key": "k"}, None),
        ({"if_length": 4}, None),
    ],
)
async def test_what_only_the_store_can_answer_is_answered_by_the_store(
    make_engine: MakeEngine, store: Store, gate: Gate, fields: dict[str, Any], error: type[Exception] | None
) -> None:
    engine = await make_engine(store)
    await engine.create("s", CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=31))
    first = await engine.append("s", quick(0, 4, if_length=0))
    assert first.length == 4
    request = quick(4, 7)._replace(**fields)
    task = asyncio.ensure_future(engine.append("s", request))
    await asyncio.sleep(0.02)
    assert task.done() == ("if_length" in fields and error is None)
    gate.opened.set()
    if error is None:
        assert (await task).start == 4
    else:
        with pytest.raises(error):
            await task
    assert (await engine.append("s", quick(7, 9))).start == (4 if error else 7)


async def test_no_more_than_a_bounded_number_of_bytes_waits(
    make_engine: MakeEngine, store: Store, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "MAX_BYTES", 7 * DIM * 4)
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    await engine.append("s", quick(0, 7))
    task = asyncio.ensure_future(engine.append("s", quick(7, 8)))
    await asyncio.sleep(0.02)
    assert not task.done()
    gate.opened.set()
    assert (await task).start == 7
    gate.opened.clear()
    assert (await engine.append("s", quick(8, 15))).length == 15


async def test_the_queue_has_its_limit(make_engine: MakeEngine, store: Store, gate: Gate) -> None:
    engine = await make_engine(store, max_waiting=5)
    await fill(engine, "s", TOKENS[:0])
    with pytest.raises(Overloaded):
        for start in range(20):
            await engine.append("s", quick(start, start + 1))
            await asyncio.sleep(0)
    gate.opened.set()
    info = await engine.inspect("s")
    assert info.length >= 5 and info.num_lost_tokens == 0
    assert (await engine.append("s", quick(0, 1))).start == info.length


async def test_after_an_append_whose_caller_went_away_the_next_one_is_waited_for(
    make_engine: MakeEngine, store: Store, gate: Gate
) -> None:
    """Whether the abandoned one was written decides where the next one begins."""
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    gone = asyncio.ensure_future(engine.append("s", AppendRequest(embeddings=TOKENS[:3])))
    await asyncio.sleep(0.05)  # it is with the store by now
    gone.cancel()
    task = asyncio.ensure_future(engine.append("s", quick(3, 5)))
    await asyncio.sleep(0.02)
    assert not task.done()
    gate.opened.set()
    assert (await task).start == 3
    gate.opened.clear()
    assert (await engine.append("s", quick(5, 7))).start == 5
    gate.opened.set()
    assert right(TOKENS[:7], await engine.attend("s", QUERY))


@pytest.mark.parametrize(("error", "expected"), [(StoreFull("full"), DiskFull), (StoreError("broken"), Unhealthy)])
async def test_a_loss_is_told_once_and_nothing_after_it_is_written(
    make_engine: MakeEngine,
    store: Store,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
    error: StoreError,
    expected: type[Exception],
) -> None:
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    await fill(engine, "other", TOKENS[:0])
    gate.opened.set()
    await engine.append("s", quick(0, 7))
    await engine.inspect("s")
    gate.opened.clear()
    gate.error = error
    for start in (7, 9, 11):
        await engine.append("s", quick(start, start + 2))
    attend = asyncio.ensure_future(engine.attend("s", QUERY))
    await asyncio.sleep(0.02)
    gate.opened.set()
    with pytest.raises(expected, match=f"'s': the tokens from position 7 on, .* are lost: {error}"):
        await attend
    assert "are lost" in caplog.text
    gate.error = None
    info = await engine.inspect("s")
    assert (info.length, info.num_lost_tokens) == (7, 6)
    assert right(TOKENS[:7], await engine.attend("s", QUERY))
    assert (await engine.append("s", quick(7, 9))).start == 7
    assert right(TOKENS[:9], await engine.attend("s", QUERY))


async def test_a_loss_in_the_middle_takes_what_was_acknowledged_after_it(
    make_engine: MakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would be stored at other positions than were answered."""
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    write, held = store.write, threading.Event()

    def fail_one(writes: Any, *, now: float) -> Any:
        assert held.wait(30)
        if any(isinstance(change, Append) and change.if_length == 3 for change in writes):
            raise StoreFull("full")
        return write(writes, now=now)

    monkeypatch.setattr(store, "write", fail_one)
    for start in range(0, 12, 3):
        await engine.append("s", quick(start, start + 3))
    held.set()
    info = await engine.inspect("s")
    assert (info.length, info.num_lost_tokens) == (3, 9)
    with pytest.raises(DiskFull, match="from position 3 on"):
        await engine.append("s", quick(12, 13))
    assert right(TOKENS[:3], await engine.attend("s", QUERY))


async def test_a_loss_in_several_groups_is_told_once(
    make_engine: MakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what followed the lost append was told again, to the next caller, when its own group failed later."""
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:7])
    write, groups, let_go = store.write, queue.SimpleQueue[int](), queue.SimpleQueue[StoreError | None]()

    def held(writes: Any, *, now: float) -> Any:
        groups.put(len(writes))
        if (error := let_go.get(timeout=30)) is not None:
            raise error
        return write(writes, now=now)

    monkeypatch.setattr(store, "write", held)
    session = engine._directory._sessions["s"]
    await engine.append("s", quick(7, 9))
    assert await asyncio.to_thread(groups.get, timeout=5) == 1
    await engine.append("s", quick(9, 11))
    (first, _) = session.unwritten
    let_go.put(StoreFull("full"))
    await asyncio.wait([first])
    assert await asyncio.to_thread(groups.get, timeout=5) == 1
    with pytest.raises(DiskFull, match="from position 7 on"):
        await engine.append("s", quick(7, 9))
    let_go.put(None)
    assert (await engine.inspect("s")).num_lost_tokens == 4
    let_go.put(None)
    assert (await engine.append("s", quick(7, 9))).start == 7
    monkeypatch.undo()
    for start in (9, 11):  # a new loss is told again
        await engine.append("s", quick(start, start + 2))
    assert right(TOKENS[:13], await engine.attend("s", QUERY))
    monkeypatch.setattr(store, "write", lambda writes, *, now: fail(StoreFull("full again")))
    await engine.append("s", quick(13, 15))
    with pytest.raises(DiskFull, match=r"from position 13 on, .*: full again"):
        await engine.attend("s", QUERY)
    assert not session.doomed and not session.unwritten


def fail(error: Exception) -> Any:
    raise error


async def test_deleting_the_session_is_no_loss(make_engine: MakeEngine, store: Store, gate: Gate) -> None:
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    await engine.append("s", quick(0, 3))
    session = engine._directory._sessions["s"]
    deletion = asyncio.ensure_future(engine.delete("s"))
    session.tip = 3
    engine._writing.behind.take(session, _change(engine, session))
    gate.opened.set()
    await deletion
    await engine._writing.behind.settle(session, 5)
    assert session.num_lost_tokens == 0
    with pytest.raises(SessionNotFound):
        await engine.inspect("s")


def _change(engine: Engine, session: Any) -> Any:
    from htm_service.writes.appends import _prepare

    return _prepare(session, quick(3, 5), False)


async def test_who_reads_waits_no_longer_than_asked(make_engine: MakeEngine, store: Store, gate: Gate) -> None:
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    await engine.append("s", quick(0, 3))
    with pytest.raises(DeadlineExceeded, match="'s' was not written within 20 ms"):
        await engine.attend("s", replace(QUERY, timeout_s=0.02))
    gate.opened.set()
    assert right(TOKENS[:3], await engine.attend("s", QUERY))


async def test_what_is_refused_does_not_wait(make_engine: MakeEngine, store: Store, gate: Gate) -> None:
    """A time that is none was first waited for, and then answered as if it had passed."""
    engine = await make_engine(store)
    await fill(engine, "s", TOKENS[:0])
    await engine.append("s", quick(0, 3))
    for bad in ({"timeout_s": -1.0}, {"timeout_s": 1e9}, {"top_k": 0}, {"queries": TOKENS[:1, :3]}):
        with pytest.raises(InvalidArgument):
            await engine.attend("s", replace(QUERY, **bad))
        with pytest.raises(InvalidArgument):
            await engine.step("s", replace(QUERY, **bad), quick(3, 4))
    gate.opened.set()
    assert (await engine.attend("s", QUERY)).length == 3
