"""Sessions larger than the device: keys resident, contents by page, every answer still the definition's."""

import asyncio
import mmap
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from htm_service.attention.model_config import ModelConfig
from htm_service.engine import Engine
from htm_service.errors import OutOfMemory, SessionDamaged, SessionNotFound, Unhealthy
from htm_service.memory import resident
from htm_service.memory.chunks import Chunks
from htm_service.memory.loader import Fetch
from htm_service.memory.resident import Resident
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from htm_service.writes import compaction
from storage.base import Block, DeleteSession, StoreDamaged
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import on_device_thread, session_of
from tests.engine.models import Weights
from tests.engine.test_attend import DIM, RETRIEVAL, check, expect, fill, models, random_request, vectors
from tests.names import named

__all__ = ["models"]  # a fixture

SIZE = 61
PAGE_BYTES = SIZE * DIM * 4
BUDGET = 20 * PAGE_BYTES
ONLY_RETRIEVAL: Mapping[str, tuple[ModelConfig, Weights | None]] = {"retrieval": (RETRIEVAL, None)}


def asks(seed: int, num_queries: int = 1, **fields: Any) -> AttendRequest:
    return AttendRequest(queries=vectors(seed, num_queries, DIM) / np.float32(3), **{"top_k": 3, **fields})


async def compact_all(engine: Engine) -> None:
    await engine.compaction.finish()


async def bytes_on_device(engine: Engine) -> int:
    return int((await engine.info()).totals["device_bytes"])


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
async def test_a_session_ten_times_larger_than_the_budget_answers_exactly(
    make_engine: MakeEngine,
    models: Mapping[str, tuple[ModelConfig, Weights | None]],
    tmp_path: Any,
    sqlite_url: str,
    url: str,
) -> None:
    """Random requests of all kinds, many at a time, before and after a restart."""
    draw = np.random.default_rng(1)
    tokens = {"large": vectors(1, 211 * SIZE + 3, DIM), "small": vectors(2, 7 * SIZE, DIM)}
    assert tokens["large"].nbytes > 10 * BUDGET
    store = open_store(sqlite_url if url == "sqlite" else url)
    for restart in range(2):
        engine = await make_engine(store, memory_budget_bytes=BUDGET, models_dir=tmp_path)
        if not restart:
            for name, rows in tokens.items():
                await fill(engine, name, rows, chunk_size=SIZE)
        for _ in range(6):
            names = [str(draw.choice(["large", "small"])) for _ in range(7)]
            requests = [random_request(draw, len(tokens[name]), SIZE) for name in names]
            results = await asyncio.gather(*(engine.attend(named(n), r) for n, r in zip(names, requests, strict=True)))
            for name, request, result in zip(names, requests, results, strict=True):
                check(result, expect(tokens[name], request, "attend", models, SIZE))
                assert result.length == len(tokens[name])
            assert await bytes_on_device(engine) <= BUDGET
        totals = (await engine.info()).totals
        assert totals["fetched_pages"] > 100 and totals["offloaded_pages"] > 100
        await engine.close()


async def test_attends_and_appends_at_once_beyond_the_budget(make_engine: MakeEngine) -> None:
    """Sessions that are read and written at the same time, all of them together six times larger than the budget."""
    engine = await make_engine(memory_budget_bytes=BUDGET)
    tokens = {f"s{i}": vectors(i, 24 * SIZE, DIM) for i in range(4)}
    begin = 20 * SIZE
    for name, rows in tokens.items():
        await fill(engine, name, rows[:begin], chunk_size=SIZE)

    async def grow(name: str) -> None:
        for start in range(begin, len(tokens[name]), 5):
            await engine.append(named(name), AppendRequest(embeddings=tokens[name][start : start + 5]))

    async def read(name: str, seed: int) -> None:
        for number in range(12):
            request = asks(seed + number, num_queries=2)
            result = await engine.attend(named(name), request)
            check(result, expect(tokens[name][: result.length], request, "attend", ONLY_RETRIEVAL, SIZE))

    await asyncio.gather(
        *(grow(n) for n in tokens), *(read(n, 100 * i) for i, n in enumerate(tokens)), compact_all(engine)
    )
    assert await bytes_on_device(engine) <= BUDGET
    request = asks(999)
    for name, rows in tokens.items():
        check(await engine.attend(named(name), request), expect(rows, request, "attend", ONLY_RETRIEVAL, SIZE))


async def test_a_mask_over_more_chunks_than_fit_is_answered_exactly(make_engine: MakeEngine) -> None:
    """Every chunk is seen in part, so every key is computed anew from contents that do not fit; meanwhile it grows."""
    engine = await make_engine(memory_budget_bytes=BUDGET)
    tokens = vectors(3, 90 * SIZE + 11, DIM)
    await fill(engine, "s", tokens, chunk_size=SIZE)
    mask = np.random.default_rng(4).random(len(tokens)) < 0.5
    request = asks(5, num_queries=2, mask=mask)
    pending = asyncio.create_task(engine.attend(named("s"), request))
    await asyncio.sleep(0)
    await engine.append(named("s"), AppendRequest(embeddings=vectors(6, 2 * SIZE, DIM)))
    result = await pending
    assert result.length == len(tokens)
    check(result, expect(tokens, request, "attend", ONLY_RETRIEVAL, SIZE))


async def test_what_is_recalled_often_stays(make_engine: MakeEngine) -> None:
    engine = await make_engine(memory_budget_bytes=BUDGET)
    tokens = vectors(7, 60 * SIZE, DIM)
    await fill(engine, "s", tokens, chunk_size=SIZE)
    often = asks(8)
    expected = await engine.attend(named("s"), often)
    for seed in range(30):
        await engine.attend(named("s"), asks(100 + seed, top_k=2))
        before = (await engine.info()).totals["fetched_pages"]
        result = await engine.attend(named("s"), often)
        np.testing.assert_array_equal(result.output, expected.output)
        assert (await engine.info()).totals["fetched_pages"] == before
    chunks = (await engine.chunks(named("s"))).chunks
    assert {chunks[int(index)].tier for index in expected.chunk_index[0]} == {"resident"}
    assert "cold" in {chunk.tier for chunk in chunks}


async def test_a_shape_without_address_space_is_out_of_memory_and_nobody_elses_trouble(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first append of such a session once ended the device thread; an attend waited until its deadline."""
    engine = await make_engine()
    tokens = vectors(1, 9, DIM)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", fail)
        await fill(engine, "s", tokens)
        with pytest.raises(OutOfMemory, match="of address space cannot be reserved: Cannot allocate memory"):
            await engine.attend(named("s"), asks(2))
    check(await engine.attend(named("s"), asks(2)), expect(tokens, asks(2), "attend", ONLY_RETRIEVAL, 5))


async def test_shapes_that_nobody_uses_keep_no_address_space(make_engine: MakeEngine) -> None:
    """Each kept as much of it as the whole budget, for ever: some thousand shapes, and the device thread died."""
    engine = await make_engine()
    for dim in range(1, 9):
        await engine.create(named("s"), CreateRequest(dim=dim))
        await engine.append(named("s"), AppendRequest(embeddings=vectors(1, 3, dim)))
        await engine.attend(named("s"), AttendRequest(queries=vectors(2, 1, dim)))
        await engine.delete(named("s"))
    assert engine.worker.cache.num_arenas == 1


async def test_what_nobody_reads_is_bounded_by_the_budget_too(make_engine: MakeEngine) -> None:
    """Bug: a session's first tokens waited in host memory until somebody wanted it, of however many sessions."""
    engine = await make_engine(memory_budget_bytes=BUDGET)
    for number in range(60):
        await fill(engine, f"s{number}", vectors(number, 3, DIM), chunk_size=SIZE)
    await on_device_thread(engine, lambda: None)  # it has done by now what was asked before
    residents = [session.resident for session in engine.directory.sessions()]
    assert sum(len(resident.pending) for resident in residents) == 0
    assert 0 < sum(resident.chunks is not None for resident in residents) <= 20
    assert await bytes_on_device(engine) <= BUDGET
    for number in (0, 59):
        answer = await engine.attend(named(f"s{number}"), asks(1))
        check(answer, expect(vectors(number, 3, DIM), asks(1), "attend", ONLY_RETRIEVAL, SIZE))


async def test_what_was_thrown_away_is_missed_at_once(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a reader that came while the store's thread threw away what had waited too long found nothing waiting."""
    monkeypatch.setattr(resident, "MAX_PENDING_BYTES", 0)
    engine = await make_engine()
    tokens = vectors(1, 7, DIM)
    await fill(engine, "s", tokens[:3], chunk_size=SIZE)
    await engine.attend(named("s"), asks(1))
    one = session_of(engine, "s").resident
    seen: list[tuple[bool, int]] = []

    class Cleared(deque[resident.Published]):
        def clear(self) -> None:
            super().clear()
            if threading.current_thread().name != "htm-store":
                return
            done = threading.Event()

            def look() -> None:
                seen.append((engine.worker.cache.want(one), one.extent.length))
                done.set()

            engine.worker.queue.post(look)
            assert done.wait(20)

    one.pending = Cleared(one.pending)
    for token in tokens[3:]:
        await engine.append(named("s"), AppendRequest(embeddings=token))
    assert seen and not any(is_here for is_here, length in seen if length > 3)
    check(await engine.attend(named("s"), asks(2)), expect(tokens, asks(2), "attend", ONLY_RETRIEVAL, SIZE))


async def test_a_load_that_fails_on_the_device_is_told_and_tried_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what was no error of ours ended the device's thread, and with it the server."""
    first = await make_engine(store := MemoryStore())
    await fill(first, "s", vectors(1, 9, DIM), chunk_size=SIZE)
    await first.close()
    engine = await make_engine(store)
    add = Chunks.append

    def fail(self: Chunks, tokens: torch.Tensor) -> None:
        monkeypatch.setattr(Chunks, "append", add)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Chunks, "append", fail)
    with pytest.raises(Unhealthy, match="out of memory"):
        await engine.attend(named("s"), asks(1))
    check(await engine.attend(named("s"), asks(1)), expect(vectors(1, 9, DIM), asks(1), "attend", ONLY_RETRIEVAL, SIZE))


async def test_a_session_that_cannot_be_compacted_keeps_no_other_from_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(store := MemoryStore())
    for name in ("bad", "good"):
        await fill(engine, name, vectors(1, 4 * SIZE, DIM), chunk_size=SIZE)
    ask = engine.worker.ask

    async def refuse(one: Resident, question: Any) -> Any:
        if one.id == "bad":
            raise OutOfMemory("no room for it")
        return await ask(one, question)

    monkeypatch.setattr(engine.worker, "ask", refuse)
    await compact_all(engine)
    kept = {name: list(store.read_summaries(session_of(engine, name).sid)) for name in ("bad", "good")}
    assert not kept["bad"] and sum(one.num_chunks for one in kept["good"]) == 4


async def test_more_chunks_at_once_than_fit_are_refused(make_engine: MakeEngine) -> None:
    engine = await make_engine(memory_budget_bytes=BUDGET)
    await fill(engine, "s", vectors(9, 60 * SIZE, DIM), chunk_size=SIZE)
    with pytest.raises(OutOfMemory, match=r"takes \d+ chunks at once that are not on the device, .* room for 10"):
        await engine.attend(named("s"), asks(1, top_k=40))
    check(
        await engine.attend(named("s"), asks(2, top_k=5, num_queries=9)),
        expect(vectors(9, 60 * SIZE, DIM), asks(2, top_k=5, num_queries=9), "attend", ONLY_RETRIEVAL, SIZE),
    )


async def test_a_restart_reads_keys_and_no_more_contents_than_it_takes(
    make_engine: MakeEngine, sqlite_url: str
) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    tokens = vectors(10, 70 * SIZE + 5, DIM)
    for start in range(0, len(tokens), 61):
        await engine_append(engine, tokens, start, start + 61)
    before = await engine.attend(named("s"), asks(3, num_queries=2))
    await engine.close()
    reopened = await make_engine(store)
    after = await reopened.attend(named("s"), asks(3, num_queries=2))
    np.testing.assert_array_equal(after.output, before.output)
    np.testing.assert_array_equal(after.chunk_index, before.chunk_index)
    assert (await reopened.info()).totals["fetched_pages"] <= 6
    assert (await reopened.inspect(named("s"))).device_bytes < tokens.nbytes / 2
    await reopened.append(named("s"), AppendRequest(embeddings=tokens[:40]))  # the open chunk goes on where it was
    whole, request = np.concatenate([tokens, tokens[:40]]), asks(4, episodes=[0, 1])
    check(await reopened.attend(named("s"), asks(5)), expect(whole, asks(5), "attend", ONLY_RETRIEVAL, SIZE))
    visible = np.zeros(len(whole), np.bool_)
    visible[: len(tokens)] = np.arange(len(tokens)) // 61 % 3 < 2
    got = await reopened.attend(named("s"), request)
    masked = asks(4, mask=visible)
    check(got, expect(whole, masked, "attend", ONLY_RETRIEVAL, SIZE))


async def engine_append(engine: Engine, tokens: Any, start: int, stop: int) -> None:
    """With an episode that changes from append to append."""
    if start == 0:
        await fill(engine, "s", tokens[:0], chunk_size=SIZE)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[start:stop], episode=start // 61 % 3))


async def test_small_blocks_are_joined_while_the_session_is_in_use(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the task that runs beside everything else: nobody has to ask."""
    monkeypatch.setattr(compaction, "INTERVAL_S", 0.01)
    monkeypatch.setattr(compaction, "PORTION_TOKENS", 2 * SIZE)
    store = MemoryStore()
    engine = await make_engine(store)
    tokens = vectors(11, 5 * SIZE, DIM)
    await fill(engine, "s", tokens[:0], chunk_size=SIZE)
    for token in tokens:
        await engine.append(named("s"), AppendRequest(embeddings=token))
    row = store.get_session(named("s"))
    assert row is not None
    for _ in range(500):
        if sum(summary.num_chunks for summary in store.read_summaries(row.sid)) == 4:
            break
        await asyncio.sleep(0.01)
    kept = b"".join(summary.data for summary in store.read_summaries(row.sid))
    chunks = (await engine.chunks(named("s"), keys=True)).chunks
    keys = np.stack([chunk.key for chunk in chunks[:4] if chunk.key is not None])
    np.testing.assert_array_equal(np.frombuffer(kept, np.float32).reshape(4, DIM), keys)


async def test_compaction_that_fails_is_told_and_keeps_nobody_from_stopping(
    make_engine: MakeEngine, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it did not expect once ended the task, and `close` raised that before anything was drained."""
    monkeypatch.setattr(compaction, "INTERVAL_S", 0.001)
    engine = await make_engine(store := open_store(sqlite_url))
    failed = asyncio.Event()

    async def fail(*_: object) -> int:
        failed.set()
        raise RuntimeError("no such portion")

    monkeypatch.setattr(engine.compaction, "compact_once", fail)
    await failed.wait()
    await fill(engine, "s", vectors(1, 9, DIM))
    await engine.append(named("s"), AppendRequest(embeddings=vectors(2, 3, DIM)))
    await engine.close()
    row = store.get_session(named("s"))
    assert row is not None and row.length == 12
    assert "compaction failed and goes on later" in caplog.text and "no such portion" in caplog.text


async def test_compaction_rests_between_its_portions(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that grow together fall due together: all that appended waited for one portion after the other."""
    monkeypatch.setattr(compaction, "INTERVAL_S", 0.001)
    monkeypatch.setattr(compaction, "PORTION_TOKENS", 2 * SIZE)
    monkeypatch.setattr(compaction, "REST", 1e6)
    engine = await make_engine(MemoryStore())
    for name in "abc":
        await fill(engine, name, vectors(1, 5 * SIZE, DIM))

    def stored() -> list[int]:
        return sorted(session_of(engine, name).num_stored_keys for name in "abc")

    for _ in range(20_000):
        if any(stored()):
            break
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert stored()[:2] == [0, 0] and stored()[2] > 0
    await engine.compaction.finish()
    assert stored()[0] == stored()[2]


async def test_a_session_that_is_deleted_while_its_chunks_are_read_is_not_found(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for them was told that the server is not healthy."""
    engine = await make_engine(store := MemoryStore())
    tokens = vectors(1, 20, DIM)
    for name in ("fetched", "read"):
        await fill(engine, name, tokens)
    await compact_all(engine)
    sessions = {name: session_of(engine, name) for name in ("fetched", "read")}
    worker, fetch = engine.worker, engine.worker.loader.fetch

    def delete(name: str) -> None:
        monkeypatch.undo()
        store.write([DeleteSession(sessions[name].sid)], now=1.0)
        sessions[name].resident.is_deleted = True
        worker.free(sessions[name].resident, lambda: None)

    chunks = sessions["fetched"].resident.held
    worker.queue.post(lambda: chunks.offload(chunks.offloadable().tolist()))

    def fetch_late(wanted: Fetch) -> None:
        delete("fetched")
        fetch(wanted)

    monkeypatch.setattr(worker.loader, "fetch", fetch_late)
    with pytest.raises(SessionNotFound, match="there is no session 'fetched'"):
        await engine.attend(named("fetched"), asks(2))
    read_blocks = store.read_blocks

    def read_late(*args: Any) -> Any:
        delete("read")
        return read_blocks(*args)

    monkeypatch.setattr(store, "read_blocks", read_late)
    with pytest.raises(SessionNotFound, match="there is no session 'read'"):
        await engine.read(named("read"), 0, None, embeddings=True, payloads=True)


async def test_keys_that_do_not_begin_with_the_session_are_computed_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the first lot of them is lost."""
    monkeypatch.setattr(compaction, "PORTION_TOKENS", 2 * SIZE)
    store = MemoryStore()
    first = await make_engine(store)
    tokens = vectors(12, 5 * SIZE, DIM)
    await fill(first, "s", tokens, chunk_size=SIZE)
    await first.close()
    read_summaries = store.read_summaries
    monkeypatch.setattr(store, "read_summaries", lambda sid: iter([*read_summaries(sid)][1:]))
    engine = await make_engine(store)
    check(await engine.attend(named("s"), asks(1)), expect(tokens, asks(1), "attend", ONLY_RETRIEVAL, SIZE))


async def test_a_damaged_chunk_fails_those_who_take_it_and_nobody_else(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    first = await make_engine(store)
    for seed, name in enumerate(("bad", "good")):
        await fill(first, name, vectors(seed, 9 * SIZE, DIM), chunk_size=SIZE)
    await first.close()
    engine = await make_engine(store)
    bad = store.get_session(named("bad"))
    read_ranges = store.read_ranges

    def damaged(ranges: Any) -> Any:
        def blocks() -> Any:
            for place, block in read_ranges(ranges):
                if bad is not None and ranges[place][0] == bad.sid:
                    raise StoreDamaged("session 'bad' is damaged at position 0")
                yield place, block

        return blocks()

    monkeypatch.setattr(store, "read_ranges", damaged)
    wrong, right = await asyncio.gather(
        engine.attend(named("bad"), asks(1)), engine.attend(named("good"), asks(1)), return_exceptions=True
    )
    assert isinstance(wrong, SessionDamaged) and "'bad' is damaged at position 0" in str(wrong)
    assert not isinstance(right, BaseException)
    check(right, expect(vectors(1, 9 * SIZE, DIM), asks(1), "attend", ONLY_RETRIEVAL, SIZE))
    monkeypatch.setattr(store, "read_ranges", lambda ranges: iter([(0, Block(0, 1, bytes(DIM * 4)))]))
    with pytest.raises(Unhealthy, match=r"of its tokens .* are there"):
        await engine.attend(named("bad"), asks(1))
    assert engine.unhealthy_reason() is None
