"""Searches while sessions change, on every kernel: right against what was acknowledged, and nothing left behind."""

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from htm_service.engine import Engine
from htm_service.errors import DeadlineExceeded
from htm_service.kernels.resolve import resolve_kernel
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SearchRequest
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, on_device_thread, session_of
from tests.engine.test_attend import vectors
from tests.engine.test_search import DIM, SIZE, check, fill, random_search, visible_of
from tests.names import named

KERNELS = ["compiled", "reference"]


async def use(engine: Engine, kernel: str) -> None:
    engine.worker.use(resolve_kernel(torch.device("cpu"), kernel))
    await on_device_thread(engine, lambda: None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("budget_pages", [1 << 20, 90], ids=["all here", "larger than the device"])
async def test_searches_while_appends_and_trims_go_on(
    make_engine: MakeEngine, sqlite_url: str, kernel: str, budget_pages: int
) -> None:
    """Each answer is that of one length the session had, of the tokens that were left; scores are exact."""
    engine = await make_engine(open_store(sqlite_url), memory_budget_bytes=budget_pages * SIZE * DIM * 4)
    await use(engine, kernel)
    tokens = vectors(1, 2_000, DIM)
    await engine.create(
        named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=90 * SIZE, on_full="evict_oldest")
    )
    draw, is_over = np.random.default_rng(5), asyncio.Event()
    hits: list[float] = []

    async def append() -> None:
        at = 0
        while at < len(tokens):
            stop = min(len(tokens), at + int(draw.integers(1, 40)))
            payloads = [None if p % 3 == 2 else b'{"at":%d}' % p for p in range(at, stop)]
            result = await engine.append(named("s"), AppendRequest(embeddings=tokens[at:stop], payloads=payloads))
            assert result.start == at
            at = stop
            await asyncio.sleep(0.002)
        is_over.set()

    async def search(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not is_over.is_set():
            n = int(random.integers(1, 12))
            request = SearchRequest(
                random.standard_normal((int(random.integers(1, 3)), DIM)).astype(np.float32),
                num_wanted=n,
                exact=bool(random.random() < 0.3),
                embeddings=bool(random.random() < 0.3),
            )
            before = await engine.inspect(named("s"))
            result = await engine.search(named("s"), request)
            after = await engine.inspect(named("s"))
            assert before.length <= result.length <= after.length
            scores = request.queries.astype(np.float64) @ tokens[: result.length].astype(np.float64).T
            for row, of in enumerate(scores):
                found = result.position[row][result.position[row] >= 0]
                assert len(found) == min(n, result.length) or len(found) >= min(n, result.length - after.first_position)
                assert (found >= before.first_position).all() and (found < result.length).all()
                np.testing.assert_allclose(result.score[row][: len(found)], of[found], rtol=1e-4, atol=1e-4)
                left = of[after.first_position :]  # these it saw in any case
                if request.exact and len(found) == n and len(left) >= n:
                    assert result.score[row][n - 1] >= np.partition(left, -n)[-n] - 1e-4
                elif len(left) >= n:
                    hits.append(float((of[found] >= np.partition(left, -n)[-n] - 1e-4).mean()))
                for at in found.tolist():
                    if result.payloads and (body := result.payloads.get(at)) is not None:
                        assert body == b'{"at":%d}' % at and at % 3 != 2
                    if result.embeddings is not None:
                        place = int(np.flatnonzero(found == at)[0])
                        np.testing.assert_array_equal(result.embeddings[row][place], tokens[at])

    await asyncio.gather(append(), *(search(seed) for seed in range(6)))
    assert len(hits) > 20 and np.mean(hits) > 0.95
    info = await engine.inspect(named("s"))
    final = SearchRequest(vectors(7, 3, DIM), num_wanted=9, exact=True, embeddings=True)
    visible = np.arange(len(tokens)) >= info.first_position
    check(await engine.search(named("s"), final), tokens, final, visible)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_extreme_tokens_are_found_like_any_others(make_engine: MakeEngine, kernel: str, dtype: str) -> None:
    """Zero vectors, tokens equal to their chunk's mean, whole chunks of one token, large and small ones."""
    engine = await make_engine()
    await use(engine, kernel)
    rows = vectors(1, 60 * SIZE, DIM)
    rows[SIZE : 2 * SIZE] = 0  # a chunk of zeros
    rows[2 * SIZE : 4 * SIZE] = rows[2 * SIZE]  # chunks whose every token is the mean
    rows[5 * SIZE + 3] = 0
    rows[6 * SIZE] = rows[6 * SIZE + 1 : 7 * SIZE].mean(axis=0)  # one that is the mean of its chunk
    rows[7 * SIZE] *= 1e3
    rows[8 * SIZE : 9 * SIZE] *= 1e-3
    stored = torch.from_numpy(rows).to(getattr(torch, dtype)).float().numpy()
    await fill(engine, "s", stored, dtype=dtype)
    draw = np.random.default_rng(3)
    zero = SearchRequest(np.zeros((1, DIM), np.float32), num_wanted=len(rows) + 5)
    for _ in range(3):
        result = await engine.search(named("s"), zero)
        assert result.position[0].tolist() == [*range(len(rows)), *[-1] * 5], "ties go to the lower position"
        for place in (SIZE, 2 * SIZE, 3 * SIZE + 2, 5 * SIZE + 3, 6 * SIZE, 7 * SIZE, 8 * SIZE + 1):
            request = SearchRequest(rows[place] + 0.01 * vectors(place, 1, DIM)[0], num_wanted=3)
            check(await engine.search(named("s"), request), stored, request, np.ones(len(rows), bool), least=0.6)
        requests = [random_search(draw, len(rows)) for _ in range(12)]
        for request, result in zip(
            requests, await asyncio.gather(*(engine.search(named("s"), one) for one in requests)), strict=True
        ):
            check(result, stored, request, visible_of(len(rows), request), least=1.0 if request.exact else 0.8)


@pytest.mark.parametrize("kernel", KERNELS)
async def test_searches_and_attends_share_batches(make_engine: MakeEngine, kernel: str) -> None:
    engine = await make_engine(max_batch_products=8 << 20)
    await use(engine, kernel)
    tokens = {name: vectors(seed, 300 + seed, DIM) for seed, name in enumerate("abc")}
    for name, rows in tokens.items():
        await fill(engine, name, rows)
    alone = [await engine.attend(named(name), AttendRequest(queries=vectors(9, 2, DIM))) for name in tokens]
    work: list[Any] = []
    request = SearchRequest(vectors(9, 2, DIM), num_wanted=4, exact=True)
    for name in [*tokens] * 5:
        work.append(engine.search(named(name), request))
        work.append(engine.attend(named(name), AttendRequest(queries=vectors(9, 2, DIM))))
    done = await asyncio.gather(*work)
    for place, name in enumerate([*tokens] * 5):
        check(done[2 * place], tokens[name], request, np.ones(len(tokens[name]), bool))
        np.testing.assert_allclose(done[2 * place + 1].output, alone[place % 3].output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", ["search", "batch_search", "attend", "batch_attend"])
async def test_what_is_done_again_after_a_truncation_has_the_time_that_was_asked_for(
    make_engine: MakeEngine, call: str
) -> None:
    """Each time it had all of its time again: over a session that was truncated all the while it went on for ever."""
    store = MemoryStore()
    engine = await make_engine(store, payload_cache_bytes=0)
    await fill(engine, "s", vectors(1, 60, DIM))
    loop, read = asyncio.get_running_loop(), store.read_payloads_each

    def truncate_first(*args: Any) -> Any:
        length = session_of(engine, "s").length
        asyncio.run_coroutine_threadsafe(engine.truncate(named("s"), length - 1), loop).result(20)
        time.sleep(0.05)
        return read(*args)

    store.read_payloads_each = truncate_first  # type: ignore[method-assign, assignment]
    search = SearchRequest(vectors(2, 1, DIM), timeout_s=0.4)
    attend = AttendRequest(queries=vectors(2, 1, DIM), payloads=True, timeout_s=0.4)
    if call.startswith("batch"):
        item = named("s"), search if "search" in call else attend
        (outcome,) = await getattr(engine, call)([item])
        assert isinstance(outcome, DeadlineExceeded)
    else:
        with pytest.raises(DeadlineExceeded):
            await getattr(engine, call)(named("s"), search if call == "search" else attend)
    assert session_of(engine, "s").length > 40


async def test_a_search_for_much_lends_no_other_its_lists(make_engine: MakeEngine) -> None:
    """All rows of a batch had lists as long as the longest: one search for much and many small ones took gigabytes."""
    engine = await make_engine()
    await use(engine, "compiled")
    tokens = vectors(1, 12_000, DIM)
    await fill(engine, "s", tokens)
    small = SearchRequest(tokens[:100], num_wanted=1, payloads=False)
    much = SearchRequest(tokens[:1], num_wanted=1_000, oversample=12, payloads=False)
    for _ in range(2):  # the second time there are sketches
        await asyncio.gather(*(engine.search(named("s"), one) for one in (much, small)))
        await asyncio.sleep(0.5)
    tracemalloc.start()
    try:
        await asyncio.gather(*(engine.search(named("s"), one) for one in (much, small)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20, peak


async def test_a_search_whose_caller_goes_or_whose_time_is_over_leaves_nothing(make_engine: MakeEngine) -> None:
    engine = await make_engine(memory_budget_bytes=40 * SIZE * DIM * 4)
    tokens = vectors(1, 150 * SIZE, DIM)
    await fill(engine, "s", tokens)
    await engine.compaction.finish()
    request = SearchRequest(vectors(2, 3, DIM), num_wanted=5, embeddings=True)
    for seconds in (0.0, 0.001, 0.004, 0.01):
        await go_cold(engine)
        work = asyncio.create_task(engine.search(named("s"), request))
        await asyncio.sleep(seconds)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    await go_cold(engine)
    with pytest.raises(DeadlineExceeded):
        await engine.search(named("s"), SearchRequest(request.queries, timeout_s=1e-6))
    for _ in range(3):
        check(await engine.search(named("s"), request), tokens, request, np.ones(len(tokens), bool), least=0.8)
    assert engine.worker.queue.num_waiting == 0 and not engine.worker.cache.reclaim.loading
    await engine.delete(named("s"))
    totals = (await engine.info()).totals
    assert totals["device_bytes"] == totals["device_sketch_bytes"] == totals["payload_cache_bytes"] == 0


async def test_one_makes_the_sketches_for_all_that_search(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search of a first batch made some of its own accord, and all of them went on doing so between batches."""
    monkeypatch.setattr("htm_service.memory.cache.SKETCHED_BYTES", 5 * SIZE * DIM * 4)
    tokens = vectors(1, 200 * SIZE, DIM)
    await fill(engine, "s", tokens)
    waiting: list[int] = [0]
    post = engine.worker.queue.post

    def counted(act: Callable[[], None]) -> bool:
        def acted() -> None:
            waiting.append(waiting[-1] - 1)
            act()

        waiting.append(waiting[-1] + 1)
        return post(acted)

    request = SearchRequest(vectors(2, 1, DIM), num_wanted=5, exact=True)
    may_go = threading.Event()

    def hold() -> None:
        may_go.wait(20)

    post(hold)
    monkeypatch.setattr(engine.worker.queue, "post", counted)
    work = asyncio.gather(*(engine.search(named("s"), request) for _ in range(16)))
    await asyncio.sleep(0.1)
    may_go.set()
    for result in await work:
        check(result, tokens, request, np.ones(len(tokens), bool))
    for _ in range(60):
        await engine.search(named("s"), request)
    table = session_of(engine, "s").resident.held.sketches
    assert table is not None and table.num_known == 200
    assert len(waiting) > 60 and max(waiting) == 1


async def test_payloads_of_trimmed_and_deleted_tokens_leave_the_host_too(engine: Engine) -> None:
    """The cache of payloads kept those of tokens that were trimmed, and of sessions that expired."""
    await engine.create(
        named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=2 * SIZE, on_full="evict_oldest")
    )
    for at in range(40):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(at, 1, DIM), payloads=[b'{"n":1}']))
    assert (await engine.info()).totals["payload_cache_bytes"] <= 2 * SIZE * (150 + 7)
    session = session_of(engine, "s")
    assert session.length == 40
    await engine.delete_sessions("default", prefix="s")
    assert (await engine.info()).totals["payload_cache_bytes"] == 0
