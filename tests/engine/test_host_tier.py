"""The host tier: what leaves the device is read back from there, within its budget, and gone when the session is."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

from htm_service.engine import Engine
from htm_service.errors import SessionExpired, SessionNotFound
from htm_service.memory import cache as residency
from htm_service.memory import host_tier
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Memory
from htm_service.memory.device import sent
from htm_service.memory.host_tier import Chunk, HostTier
from htm_service.memory.loader import Fetch
from htm_service.reads import worker as device_worker
from htm_service.reads.worker import DeviceWorker
from htm_service.records import AppendRequest
from htm_service.session_settings import SessionSettings
from htm_service.sessions.recalls import RecallLog
from htm_service.sessions.session import Session
from storage.base import Store
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, check, expect, fill, vectors
from tests.engine.test_tiers import BUDGET, ONLY_RETRIEVAL, PAGE_BYTES, SIZE, asks

CPU = torch.device("cpu")
NUM_PAGES = 16
"""Of the tier that is tried alone; each is a slab of its own."""


def make_session(dim: int = DIM, num_chunks: int = 40, seed: int = 0) -> Session:
    """A session whose chunks are all on the device."""
    settings = SessionSettings(
        dim=dim,
        chunk_size=SIZE,
        model="retrieval",
        dtype="float32",
        open_chunk="attend",
        labels={},
        ttl_s=None,
        on_full="reject",
        max_tokens=None,
    )
    budget = Budget(1 << 24)
    memory = Memory(Arena(*settings.shape, CPU, budget), budget)
    memory.append(torch.from_numpy(vectors(seed, num_chunks * SIZE, dim)))
    return Session(
        id=f"s{seed}",
        sid=seed,
        settings=settings,
        created_at=0.0,
        updated_at=0.0,
        last_used_at=0.0,
        length=num_chunks * SIZE,
        first_position=0,
        recalls=RecallLog(0),
        memory=memory,
    )


def keep(tier: HostTier, session: Session, *chunks: int) -> None:
    tier.keep(session, np.array(chunks, np.int64))


def contents(session: Session, chunk: int) -> torch.Tensor:
    assert session.memory is not None
    return session.memory.page(chunk)


class Listed:
    """What the tier is compared with: chunks in a list, the next to go first."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.holds: list[dict[Session, set[int]]] = []

    @property
    def free(self) -> list[Chunk]:
        """Those that nobody holds."""
        return [
            (one, chunk) for one, chunk in self.chunks if not any(chunk in held.get(one, ()) for held in self.holds)
        ]

    def keep(self, session: Session, chunks: list[int]) -> None:
        wanted = [(session, chunk) for chunk in chunks if chunk >= session.first_chunk]
        again = [key for key in wanted if key in self.free]
        self.chunks = [key for key in self.chunks if key not in again] + again
        new = [key for key in wanted if key not in self.chunks]
        while len(self.chunks) + len(new) > NUM_PAGES and self.free:
            self.chunks.remove(self.free[0])
        room = NUM_PAGES - len(self.chunks)
        self.chunks += new[max(0, len(new) - room) :]

    def release(self) -> None:
        """The oldest hold."""
        released = [(one, chunk) for one, some in self.holds.pop(0).items() for chunk in some]
        first = [key for key in released if key in self.free]
        self.chunks = first[::-1] + [key for key in self.chunks if key not in first]

    def let_go(self, session: Session, chunks: Iterable[int]) -> None:
        self.chunks = [(one, chunk) for one, chunk in self.chunks if one is not session or chunk not in chunks]


@pytest.mark.parametrize("seed", range(5))
def test_the_tier_equals_a_list(seed: int) -> None:
    """Random keeps, holds, reads, releases, evictions and deletions."""
    draw = np.random.default_rng(seed)
    tier, listed = HostTier(CPU, NUM_PAGES * PAGE_BYTES), Listed()
    sessions = [make_session(seed=number) for number in range(3)]
    for _ in range(400):
        number = int(draw.integers(3))
        session, event = sessions[number], draw.random()
        chunks = draw.choice(40, int(draw.integers(1, 21)), replace=False)
        if event < 0.5:
            tier.keep(session, chunks)
            listed.keep(session, chunks.tolist())
        elif event < 0.7:
            listed.holds.append(tier.hold({session: chunks.tolist()}))
            assert listed.holds[-1] == {session: {c for c in chunks.tolist() if (session, c) in listed.chunks}}
        elif event < 0.9 and listed.holds:
            for one, some in listed.holds[0].items():
                read = tier.read(one, some)
                assert read.keys() == {chunk for chunk in some if (one, chunk) in listed.chunks}
                assert all(torch.equal(tokens, contents(one, chunk)) for chunk, tokens in read.items())
            tier.release(listed.holds[0])
            listed.release()
        elif event < 0.97:
            gone = range(session.first_chunk, min(39, session.first_chunk + 2))
            session.first_position = gone.stop * SIZE
            tier.let_go(session, gone)
            listed.let_go(session, gone)
        else:
            tier.forget(session)
            session.is_deleted = True
            keep(tier, session, 39)
            listed.let_go(session, range(40))
            assert session.host_pages == {}
            sessions[number] = make_session(seed=number)
        assert list(tier._order) == listed.free
        assert {(one, chunk) for one in sessions for chunk in one.host_pages} == set(listed.chunks)
        assert tier.budget.used_bytes == len(listed.chunks) * PAGE_BYTES <= NUM_PAGES * PAGE_BYTES
        assert tier.budget.used_bytes == sum(one.host_bytes for one in sessions)


def test_sessions_of_other_shapes_share_the_budget() -> None:
    """The oldest makes room whatever its shape, and shapes that hold nothing keep no address space."""
    tier = HostTier(CPU, NUM_PAGES * PAGE_BYTES)
    sessions = [make_session(dim, seed=dim) for dim in (DIM, 7, 2 * DIM)]
    for session in sessions:
        keep(tier, session, *range(12))
        assert list(session.host_pages)[-1] == 11
        assert tier.budget.used_bytes <= NUM_PAGES * PAGE_BYTES
    large = sessions[-1]
    assert len(large.host_pages) == NUM_PAGES // 2  # the last ones: there was no room for all
    assert all(torch.equal(page, contents(large, chunk)) for chunk, page in tier.read(large, range(12)).items())
    for session in sessions:
        tier.forget(session)
    keep(tier, make_session(3), 0)
    assert len(tier._arenas) == 1


def test_a_chunk_larger_than_the_budget_pushes_nothing_out() -> None:
    """Everything else once went before it turned out that there never is room for it."""
    tier, small, large = HostTier(CPU, NUM_PAGES * PAGE_BYTES), make_session(), make_session(DIM * (NUM_PAGES + 1), 2)
    keep(tier, small, *range(NUM_PAGES))
    keep(tier, large, 0, 1)
    assert (len(small.host_pages), large.host_pages) == (NUM_PAGES, {})


def test_what_came_back_to_the_device_goes_first_and_what_was_only_read_last() -> None:
    tier, session = HostTier(CPU, NUM_PAGES * PAGE_BYTES), make_session()
    memory = session.memory
    assert memory is not None
    keep(tier, session, *range(5))
    memory.drop([1, 2, 3, 4])
    held = tier.hold({session: [1, 2]})
    memory.put([2], tier.read(session, [2])[2][None])
    tier.release(held)
    assert [chunk for _, chunk in tier._order] == [2, 0, 3, 4, 1]
    held = tier.hold({session: [0]})
    session.memory = None  # it went cold meanwhile
    tier.release(held)
    assert [chunk for _, chunk in tier._order] == [2, 3, 4, 1, 0]


def test_without_a_budget_nothing_is_kept() -> None:
    tier, session = HostTier(CPU, 0), make_session()
    keep(tier, session, 1, 2)
    assert (tier.hold({session: [1, 2]}), tier._arenas, session.host_bytes) == ({session: set()}, {}, 0)


def test_memory_that_cannot_be_had_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a GPU: page-locked slabs, powers of two, one of which the system does not give."""
    asked: list[tuple[int, bool]] = []
    empty = torch.empty

    def limited(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        slab = empty(*shape, **options)
        if asked:
            raise RuntimeError("CUDA error: out of memory")
        asked.append((slab.nbytes, pin_memory))
        return slab

    tier, session = HostTier(torch.device("cuda"), 1 << 20), make_session()
    monkeypatch.setattr(torch, "empty", limited)
    slab_bytes = 1 << 16  # a sixteenth
    num_pages = slab_bytes // PAGE_BYTES
    keep(tier, session, *range(num_pages))
    assert asked == [(num_pages * PAGE_BYTES, True)]
    assert tier.budget.used_bytes == slab_bytes
    keep(tier, session, 30)
    assert tier.budget.limit_bytes == slab_bytes
    assert f"the host tier stays at {slab_bytes} bytes from now on: {slab_bytes} bytes cannot be" in caplog.text
    keep(tier, session, 31)  # takes the place of the oldest
    arena = tier._arenas[session.settings.shape]
    assert num_pages < 30
    assert list(session.host_pages) == [*range(1, num_pages), 31]
    assert all(torch.equal(arena.page(page), contents(session, chunk)) for chunk, page in session.host_pages.items())


def test_a_small_tensor_is_sent_to_a_gpu_from_page_locked_memory() -> None:
    calls: list[Any] = []

    class Recorder:
        def pin_memory(self) -> "Recorder":
            calls.append("pin")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> "Recorder":
            calls.append((device.type, non_blocking))
            return self

    sent(cast(torch.Tensor, Recorder()), torch.device("cuda"))
    assert calls == ["pin", ("cuda", True)]


# --- in an engine ---


def count_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of each read of contents from now on."""
    num_chunks: list[int] = []
    read_ranges = store.read_ranges

    def counted(ranges: Any) -> Iterator[Any]:
        num_chunks.append(sum((stop - start) // SIZE for _, start, stop in ranges))
        return read_ranges(ranges)

    monkeypatch.setattr(store, "read_ranges", counted)
    return num_chunks


async def host_bytes(engine: Engine) -> int:
    return int((await engine.info()).totals["host_bytes"])


async def on_device_thread(engine: Engine, action: Callable[[], object]) -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def act() -> None:
        action()
        loop.call_soon_threadsafe(done.set)

    engine.worker.batcher.post(act)
    await done.wait()


async def drop_all(engine: Engine, name: str) -> Session:
    """Have all sealed chunks of a session leave the device."""
    session = engine._directory._sessions[name]
    memory = session.memory
    assert memory is not None
    await on_device_thread(engine, lambda: engine.worker.residency._give_up(session, memory, memory.droppable()))
    return session


async def test_a_session_ten_times_larger_than_the_device_is_read_from_the_store_less(
    make_engine: MakeEngine, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are the definition's whatever the host budget; with room for everything nothing is read at all."""
    store = open_store(sqlite_url)
    tokens = vectors(1, 205 * SIZE + 3, DIM)
    assert tokens.nbytes > 10 * BUDGET
    expected = [expect(tokens, asks(number), "attend", ONLY_RETRIEVAL, SIZE) for number in range(30)]
    num_read: dict[int, int] = {}
    for budget in (0, 64 * PAGE_BYTES, 256 * PAGE_BYTES):
        engine = await make_engine(store, memory_budget_bytes=BUDGET, host_budget_bytes=budget)
        await fill(engine, f"s{budget}", tokens, chunk_size=SIZE)
        with monkeypatch.context() as patched:
            reads = count_reads(store, patched)
            for _ in range(5):
                results = await asyncio.gather(*(engine.attend(f"s{budget}", asks(number)) for number in range(30)))
                for result, wanted in zip(results, expected, strict=True):
                    check(result, wanted)
                assert await host_bytes(engine) <= budget
                assert (await engine.inspect(f"s{budget}")).host_bytes <= await host_bytes(engine)
        num_read[budget] = sum(reads)
        totals = (await engine.info()).totals
        assert totals["fetched_pages"] > 100
        assert totals["host_reads"] + num_read[budget] >= totals["fetched_pages"]
        await engine.close()
    none, some, all_ = num_read.values()
    assert none > some > all_ == 0


async def test_a_batch_asks_the_store_once_for_what_the_host_tier_has_not(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, which need keys of contents, included; and inspection says where each chunk is."""
    engine = await make_engine(store := MemoryStore(), host_budget_bytes=64 * PAGE_BYTES)
    tokens = vectors(2, 20 * SIZE + 1, DIM)
    await fill(engine, "s", tokens, chunk_size=SIZE)
    session = await drop_all(engine, "s")
    await on_device_thread(engine, lambda: engine.worker.residency.host.let_go(session, range(5)))
    tiers = [chunk.tier for chunk in (await engine.chunks("s")).chunks]
    assert tiers == ["cold"] * 5 + ["host"] * 15 + ["resident"]
    info = await engine.inspect("s")
    assert info.host_bytes == 15 * PAGE_BYTES <= await host_bytes(engine)
    monkeypatch.setattr(device_worker, "CHUNKS_AT_ONCE", 4)
    reads = count_reads(store, monkeypatch)
    mask = np.random.default_rng(4).random(len(tokens)) < 0.5
    requests = [asks(5, num_queries=2, mask=mask), asks(6, top_k=20), asks(7)]
    for request, result in zip(
        requests, await asyncio.gather(*(engine.attend("s", one) for one in requests)), strict=True
    ):
        check(result, expect(tokens, request, "attend", ONLY_RETRIEVAL, SIZE))
    assert reads == [5]
    assert (await engine.info()).totals["host_reads"] >= 15


@pytest.mark.parametrize(("budget", "num_dropped"), [(0, [10, 5]), (64 * PAGE_BYTES, [3, 4])])
async def test_few_chunks_are_copied_at_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, budget: int, num_dropped: list[int]
) -> None:
    """Attends wait for the copies; to drop without them costs next to nothing."""
    monkeypatch.setattr(residency, "DROP_SHARE", 2)
    monkeypatch.setattr(residency, "COPIED_AT_ONCE", 3 * PAGE_BYTES)
    engine = await make_engine(host_budget_bytes=budget)
    await fill(engine, "s", vectors(6, 20 * SIZE, DIM), chunk_size=SIZE)
    memory = engine._directory._sessions["s"].memory
    assert memory is not None
    for num_wanted, expected in zip((1, 4), num_dropped, strict=True):
        before = engine.worker.residency.num_dropped
        await on_device_thread(engine, partial(engine.worker.residency._drop, memory.arena, num_wanted))
        assert engine.worker.residency.num_dropped - before == expected


async def test_a_session_that_goes_cold_keeps_its_chunks_here(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are read again, its contents are not."""
    engine = await make_engine(store := MemoryStore(), host_budget_bytes=64 * PAGE_BYTES)
    tokens = {name: vectors(seed, 20 * SIZE, DIM) for seed, name in enumerate(("s", "other"))}
    for name, rows in tokens.items():
        await fill(engine, name, rows, chunk_size=SIZE)
        await engine.attend(name, asks(1))
    await engine._sealer.finish()
    sessions = engine._directory._sessions
    await on_device_thread(engine, lambda: engine.worker.residency._evict_oldest(sessions["other"]))
    info = await engine.inspect("s")
    assert (info.residency, info.device_bytes, info.host_bytes) == ("cold", 0, 20 * PAGE_BYTES)
    reads = count_reads(store, monkeypatch)
    check(await engine.attend("s", asks(2)), expect(tokens["s"], asks(2), "attend", ONLY_RETRIEVAL, SIZE))
    assert reads == []


@pytest.mark.parametrize("way", ["delete", "expire"])
@pytest.mark.parametrize("is_cold", [False, True])
async def test_a_deleted_session_leaves_nothing_here(make_engine: MakeEngine, way: str, is_cold: bool) -> None:
    engine = await make_engine(host_budget_bytes=64 * PAGE_BYTES)
    now = engine._directory._started_at
    engine._directory._clock = lambda: now
    await fill(engine, "s", vectors(3, 9 * SIZE, DIM), chunk_size=SIZE, ttl_s=60.0)
    session = await drop_all(engine, "s")
    if is_cold:
        await on_device_thread(engine, lambda: engine.worker.residency.evict(session))
    assert session.host_bytes == 9 * PAGE_BYTES
    if way == "delete":
        await engine.delete("s")
    else:
        now += 61.0
        await engine._sweeper.sweep()
    assert (session.host_pages, await host_bytes(engine), session.is_deleted) == ({}, 0, True)
    with pytest.raises((SessionNotFound, SessionExpired)):
        await engine.attend("s", asks(1))


@pytest.mark.parametrize("is_cold", [False, True])
async def test_evicted_chunks_leave_nothing_here(make_engine: MakeEngine, is_cold: bool) -> None:
    engine = await make_engine(host_budget_bytes=64 * PAGE_BYTES)
    tokens = vectors(4, 16 * SIZE, DIM)
    options = {"chunk_size": SIZE, "max_tokens": 10 * SIZE, "on_full": "evict_oldest"}
    await fill(engine, "s", tokens[: 9 * SIZE], **options)
    session = await drop_all(engine, "s")
    if is_cold:
        await on_device_thread(engine, lambda: engine.worker.residency.evict(session))
    for start in range(9 * SIZE, len(tokens), SIZE):
        await engine.append("s", AppendRequest(embeddings=tokens[start : start + SIZE]))
    assert session.first_chunk == 6
    assert sorted(session.host_pages) == [6, 7, 8]
    assert await host_bytes(engine) <= 64 * PAGE_BYTES
    result = await engine.attend("s", asks(5, top_k=10))
    rest = expect(tokens[6 * SIZE :], asks(5, top_k=10), "attend", ONLY_RETRIEVAL, SIZE)
    np.testing.assert_allclose(result.output, rest.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_stored", [0, 4], ids=["all here", "some in the store"])
async def test_a_session_that_is_deleted_while_its_chunks_are_held_is_not_found(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_stored: int
) -> None:
    engine = await make_engine(host_budget_bytes=64 * PAGE_BYTES)
    await fill(engine, "s", vectors(5, 9 * SIZE, DIM), chunk_size=SIZE)
    session = await drop_all(engine, "s")
    worker: DeviceWorker = engine.worker
    await on_device_thread(engine, lambda: worker.residency.host.let_go(session, range(num_stored)))
    hold = worker.residency.host.hold

    def hold_late(wanted: Any) -> Any:
        held = hold(wanted)
        worker.forget(session)
        return held

    monkeypatch.setattr(worker.residency.host, "hold", hold_late)
    with pytest.raises(SessionNotFound, match="there is no session 's'"):
        await engine.attend("s", asks(1, top_k=9))
    await on_device_thread(engine, lambda: None)  # it releases what it held after it has answered
    assert (session.host_pages, await host_bytes(engine), worker.residency.host._held) == ({}, 0, {})


async def test_what_is_held_stays_while_the_store_is_read(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other chunks come here meanwhile; were the held ones to go, those who wait might wait for ever."""
    engine = await make_engine(store := MemoryStore(), host_budget_bytes=16 * PAGE_BYTES)
    tokens = {name: vectors(seed, 16 * SIZE, DIM) for seed, name in enumerate(("s", "other"))}
    for name, rows in tokens.items():
        await fill(engine, name, rows, chunk_size=SIZE)
        await engine.attend(name, asks(1))
    session = await drop_all(engine, "s")
    worker = engine.worker
    await on_device_thread(engine, lambda: worker.residency.host.let_go(session, range(4)))
    reads, fetch = count_reads(store, monkeypatch), worker.loader.fetch
    other = engine._directory._sessions["other"]

    def fetch_late(wanted: Fetch) -> None:
        worker.residency.host.keep(other, np.arange(16))
        assert len(other.host_pages) == 4
        fetch(wanted)

    monkeypatch.setattr(worker.loader, "fetch", fetch_late)
    request = asks(2, top_k=16)
    check(await engine.attend("s", request), expect(tokens["s"], request, "attend", ONLY_RETRIEVAL, SIZE))
    assert reads == [4]


def test_an_evicted_chunk_is_not_kept_from_a_session_that_loads() -> None:
    """The device still has pages of it while it learns, in a load, how far evictions went."""
    tier, session = HostTier(CPU, NUM_PAGES * PAGE_BYTES), make_session()
    session.first_position = 3 * SIZE
    keep(tier, session, 1, 2, 3, 4)
    assert sorted(session.host_pages) == [3, 4]


def test_slabs_are_small_where_the_device_thread_waits_for_them() -> None:
    session = make_session()
    tier = HostTier(CPU, 1 << 34)
    keep(tier, session, 0)
    assert tier.budget.used_bytes <= host_tier.SLAB_BYTES
