"""What sees more chunks in part than one read brings is answered exactly, and takes the room of one at a time."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.errors import SessionNotFound, Unavailable
from htm_service.kernels.base import Search, View
from htm_service.reads import runner, worker
from htm_service.reads.gathering import Gathering
from htm_service.reads.visibility import KnownKeys
from htm_service.records import AppendRequest, AttendResult, SearchRequest
from storage.base import Store, StoreError
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import on_device_thread, session_of
from tests.engine.test_attend import DIM, check, expect, fill, random_request, vectors
from tests.engine.test_tiers import BUDGET, ONLY_RETRIEVAL, PAGE_BYTES, SIZE, asks, compact_all
from tests.names import named

NUM_CHUNKS = 41
TOKENS = vectors(1, NUM_CHUNKS * SIZE + 7, DIM)


async def restarted(make_engine: MakeEngine, store: Store, *names: str, **config: Any) -> Engine:
    """An engine that has nothing of its sessions but their keys."""
    first = await make_engine(store)
    for name in names:
        await fill(first, name, TOKENS, chunk_size=SIZE)
    await compact_all(first)
    await first.close()
    return await make_engine(store, memory_budget_bytes=BUDGET, **config)


@pytest.fixture
def reads_of_three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What each read brings are three chunks; whose keys became known, in order."""
    order: list[object] = []
    add = KnownKeys.add

    def noted(self: KnownKeys, *args: Any) -> None:
        order.append(self)
        add(self, *args)

    monkeypatch.setattr(worker, "READ_BYTES", 3 * PAGE_BYTES)
    monkeypatch.setattr(KnownKeys, "add", noted)
    yield order
    order.clear()


def masks(num: int) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.random(len(TOKENS)) < 0.5 for _ in range(num)]


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
async def test_one_gathers_at_a_time(
    make_engine: MakeEngine, sqlite_url: str, reads_of_three: list[object], url: str
) -> None:
    """Each kept its keys while the others read theirs, in dictionaries: a hundred attends with `episodes` over
    150,000 such chunks took 11 GB, and the device thread was stuck.
    """
    engine = await restarted(make_engine, open_store(sqlite_url if url == "sqlite" else url), "s")
    requests = [asks(seed, mask=mask) for seed, mask in enumerate(masks(6))]
    small = asks(9, start=4 * SIZE + 2, stop=20 * SIZE + 3)  # two chunks are cut: one read
    *results, first = await asyncio.gather(*(engine.attend(named("s"), one) for one in [*requests, small]))
    for request, result in zip([*requests, small], [*results, first], strict=True):
        check(result, expect(TOKENS, request, "attend", ONLY_RETRIEVAL, SIZE))
    turns = [len(list(run)) for _, run in groupby(reads_of_three, key=id)]
    assert len(requests) <= len(turns) <= len(requests) + 3 and max(turns) > 10  # the small one comes between


async def test_parts_of_one_attend_share_what_they_know(make_engine: MakeEngine, reads_of_three: list[object]) -> None:
    engine = await restarted(make_engine, open_store("memory://"), "s", max_batch_products=4 << 20)
    request = asks(5, num_queries=24, mask=masks(1)[0])
    result = await engine.attend(named("s"), request)
    check(result, expect(TOKENS, request, "attend", ONLY_RETRIEVAL, SIZE))
    assert len({id(keys) for keys in reads_of_three}) == 1 and len(reads_of_three) <= NUM_CHUNKS // 3 + 2


async def test_random_requests_that_gather(
    make_engine: MakeEngine, sqlite_url: str, reads_of_three: list[object]
) -> None:
    """Ranges, masks, stops and searches together, some of whose callers go."""
    engine = await restarted(make_engine, open_store(sqlite_url), "s")
    draw = np.random.default_rng(7)
    for _ in range(12):
        requests = [random_request(draw, len(TOKENS), SIZE) for _ in range(6)]
        requests = [asks(3, mask=one.mask, stop=one.stop, start=one.start, chunk_mask=None) for one in requests]
        tasks = [asyncio.create_task(engine.attend(named("s"), one)) for one in requests]
        query = vectors(int(draw.integers(100)), 2, DIM)
        search = engine.search(named("s"), SearchRequest(queries=query, num_wanted=5, exact=True))
        gone = draw.random(len(tasks)) < 0.3
        await asyncio.sleep(float(draw.random() * 0.02))
        for task in np.array(tasks)[gone]:
            task.cancel()
        found = await search
        np.testing.assert_array_equal(found.position, np.argsort(-(query @ TOKENS.T), kind="stable")[:, :5])
        for request, task in zip(requests, tasks, strict=True):
            with contextlib.suppress(asyncio.CancelledError):
                check(await task, expect(TOKENS, request, "attend", ONLY_RETRIEVAL, SIZE))
    assert reads_of_three


async def test_the_next_goes_on_whatever_becomes_of_the_one_before(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, reads_of_three: list[object]
) -> None:
    """Its caller goes, its session is deleted, or cannot be read."""
    engine = await restarted(make_engine, open_store("memory://"), "s", "t")
    mask = masks(1)[0]
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    admits = Gathering.admits

    def noted(self: Gathering, ticket: Any) -> bool:
        loop.call_soon_threadsafe(began.set)
        return admits(self, ticket)

    monkeypatch.setattr(Gathering, "admits", noted)

    async def both() -> tuple[asyncio.Task[AttendResult], asyncio.Task[AttendResult]]:
        """One that gathers, of the session `t`, and one of `s` behind it."""
        began.clear()
        first = asyncio.create_task(engine.attend(named("t"), asks(1, mask=mask)))
        await asyncio.wait_for(began.wait(), 5)
        return first, asyncio.create_task(engine.attend(named("s"), asks(2, mask=mask)))

    expected = expect(TOKENS, asks(2, mask=mask), "attend", ONLY_RETRIEVAL, SIZE)
    first, second = await both()
    first.cancel()
    check(await second, expected)

    resident = session_of(engine, "t").resident
    read_keys, read_tokens = MemoryStore.read_summaries, MemoryStore.read_ranges

    def no_keys(self: MemoryStore, sid: int) -> Any:
        if sid == resident.sid:
            raise StoreError("the disk is gone")
        return read_keys(self, sid)

    def no_tokens(self: MemoryStore, ranges: Any) -> Any:
        if any(sid == resident.sid for sid, _, _ in ranges):
            raise StoreError("the disk is gone")
        return read_tokens(self, ranges)

    for name, fails in ("read_summaries", no_keys), ("read_ranges", no_tokens):
        with monkeypatch.context() as patched:
            first, second = await both()
            patched.setattr(MemoryStore, name, fails)
            if name == "read_summaries":
                await on_device_thread(engine, lambda: engine.worker.cache.offload(resident))
            with pytest.raises(Unavailable, match="the disk is gone"):
                await first
            check(await second, expected)
    first, second = await both()
    await engine.delete(named("t"))
    with pytest.raises(SessionNotFound):
        await first
    check(await second, expected)


async def test_a_truncation_meanwhile_leaves_nothing_known(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, reads_of_three: list[object]
) -> None:
    """What was learned of the tokens that are gone is of positions that others have now."""
    store, of_three = open_store("memory://"), 3
    first = await make_engine(store)
    await fill(first, "s", [], chunk_size=SIZE)

    async def append(engine: Engine, tokens: Any) -> None:
        for number, part in enumerate(np.array_split(tokens, 3 * NUM_CHUNKS)):
            await engine.append(named("s"), AppendRequest(embeddings=part, episode=number % of_three))

    await append(first, TOKENS)
    await compact_all(first)
    await first.close()
    engine = await make_engine(store, memory_budget_bytes=BUDGET)
    began, is_truncated = asyncio.Event(), threading.Event()
    loop, add = asyncio.get_running_loop(), KnownKeys.add

    def held_up(self: KnownKeys, *args: Any) -> None:
        add(self, *args)
        if len(reads_of_three) == 5:
            loop.call_soon_threadsafe(began.set)
            assert is_truncated.wait(10)

    monkeypatch.setattr(KnownKeys, "add", held_up)
    answer = asyncio.create_task(engine.attend(named("s"), asks(1, episodes=[1])))
    await asyncio.wait_for(began.wait(), 10)
    await engine.truncate(named("s"), 0)
    others = vectors(2, len(TOKENS), DIM)
    await append(engine, others)
    is_truncated.set()
    result = await answer
    of_episode = np.concatenate(
        [
            np.full(len(part), number % of_three == 1)
            for number, part in enumerate(np.array_split(others, 3 * NUM_CHUNKS))
        ]
    )
    assert result.length == len(others) and len(reads_of_three) > 5
    check(result, expect(others, asks(1, mask=of_episode), "attend", ONLY_RETRIEVAL, SIZE))


async def test_nothing_is_kept_of_what_is_done(make_engine: MakeEngine, reads_of_three: list[object]) -> None:
    engine = await restarted(make_engine, open_store("memory://"), "s")
    await asyncio.gather(*(engine.attend(named("s"), asks(1, mask=mask)) for mask in masks(3)))
    known = [weakref.ref(keys) for keys in reads_of_three]
    reads_of_three.clear()
    await on_device_thread(engine, lambda: None)
    await on_device_thread(engine, lambda: None)  # after the turn of the one before
    assert known and not any(keys() for keys in known)


async def test_keys_are_copied_for_a_few_at_a_time(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attend that cuts chunks has keys of its own: 100 in a batch had 100 copies of all its session's keys."""
    engine = await make_engine()
    await fill(engine, "s", TOKENS, chunk_size=SIZE)
    await fill(engine, "t", TOKENS, chunk_size=SIZE)
    monkeypatch.setattr(runner, "COPIED_BYTES", 3 * (NUM_CHUNKS + 1) * DIM * 4)
    groups: list[int] = []
    view = View

    def noted(arena: Any, positions: Any, searches: Sequence[Search], **others: Any) -> View:
        groups.append(sum(search.num_queries for search in searches))
        return view(arena, positions, searches, **others)

    monkeypatch.setattr(runner, "View", noted)
    requests = [(named("s"), asks(seed, mask=mask)) for seed, mask in enumerate(masks(8))]
    requests[4:4] = [(named("t"), asks(20 + seed)) for seed in range(5)]  # these copy nothing
    outcomes = await engine.batch_attend(requests)
    for (_, request), outcome in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, AttendResult)
        check(outcome, expect(TOKENS, request, "attend", ONLY_RETRIEVAL, SIZE))
    assert sorted(groups) == [2, 3, 8]
