"""`on_full: evict_oldest`: whole chunks go, positions and chunks keep their numbers, answers are those of the rest."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htm_service.attention.model_config import ModelConfig
from htm_service.engine import Engine
from htm_service.errors import ChunkNotFound, InvalidArgument, LengthConflict, SessionNotFound, Unhealthy
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks
from htm_service.memory.loader import Fetch
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest
from storage.base import Append, Appended, Block, Compact, DeleteSession, Store, Summary
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, publish, session_of
from tests.engine.models import Weights
from tests.engine.test_attend import DIM, RETRIEVAL, SIZE, check, expect, models, random_request, vectors
from tests.names import named

__all__ = ["models"]  # a fixture

Models = Mapping[str, tuple[ModelConfig, Weights | None]]
MAX_TOKENS = 31
MAX_APPEND = MAX_TOKENS - SIZE + 1
ONLY_RETRIEVAL: Models = {"retrieval": (RETRIEVAL, None)}
QUERY = AttendRequest(queries=vectors(99, 2, DIM) / np.float32(3), top_k=4)


def first_of(length: int, max_tokens: int = MAX_TOKENS) -> int:
    """Where a session of this length begins, by the definition."""
    return max(0, -(-(length - max_tokens) // SIZE) * SIZE)


async def create(engine: Engine, name: str = "s", max_tokens: int = MAX_TOKENS) -> None:
    settings = CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=max_tokens, on_full="evict_oldest")
    await engine.create(named(name), settings)


def of_the_rest(tokens: Any, request: AttendRequest, first: int, of: Models = ONLY_RETRIEVAL) -> Any:
    """The definition, with what was trimmed hidden: numbers stay as they are."""
    return expect(tokens, replace(request, start=max(request.start, first)), "attend", of)


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
async def test_every_answer_is_that_of_the_remaining_tokens(
    make_engine: MakeEngine, models: Models, tmp_path: Path, sqlite_url: str, url: str
) -> None:
    """Over appends of all sizes, requests of all kinds, cold spells, sealing and restarts."""
    draw = np.random.default_rng(11)
    store = open_store(sqlite_url if url == "sqlite" else url)
    engine = await make_engine(store, models_dir=tmp_path)
    await create(engine)
    tokens = vectors(1, 400, DIM)
    length = 0
    while length < 370:
        stop = length + int(draw.choice([1, 2, SIZE, int(draw.integers(1, MAX_APPEND + 1))]))
        payloads = [b'{"at": %d}' % position for position in range(length, stop)]
        request = AppendRequest(embeddings=tokens[length:stop], payloads=payloads, episode=stop // 40)
        assert (await engine.append(named("s"), request)).start == length
        length, first = stop, first_of(stop)
        event = draw.random()
        if event < 0.2:
            await engine.compaction.finish()
        if event < 0.1:
            await engine.close()
            engine = await make_engine(store, models_dir=tmp_path)
        elif event < 0.4:
            await go_cold(engine)
        info = await engine.inspect(named("s"))
        assert (info.first_position, info.length, info.num_chunks) == (first, length, -(-length // SIZE))
        assert info.stored_bytes == (length - first) * DIM * 4
        for ask in (random_request(draw, length), replace(random_request(draw, length), stop=None, mask=None)):
            if ask.stop is not None and ask.stop < first:
                with pytest.raises(InvalidArgument, match=f"stop is {ask.stop}, the session's tokens before {first}"):
                    await engine.attend(named("s"), ask)
                continue
            if ask.stop is None and ask.chunk_mask is not None:
                ask = replace(ask, chunk_mask=None)
            check(await engine.attend(named("s"), ask), of_the_rest(tokens[:length], ask, first, models))
        memories = await engine.read(named("s"), 0, None, embeddings=True, payloads=True)
        assert (memories.start, memories.stop) == (first, length)
        np.testing.assert_array_equal(memories.embeddings, tokens[first:length])
        assert memories.payloads == [b'{"at": %d}' % position for position in range(first, length)]
        chunks = (await engine.chunks(named("s"), limit=3, keys=True)).chunks
        assert [chunk.index for chunk in chunks] == [*range(first // SIZE, -(-length // SIZE))][:3]
        assert chunks[0].key is not None
        np.testing.assert_allclose(chunks[0].key, tokens[first : first + SIZE][: length - first].mean(0), atol=1e-5)
        assert list(store.verify()) == []
    episodes = replace(QUERY, episodes=[length // 40])
    visible = (np.arange(length) >= first) & np.array([run_of(p, store) == length // 40 for p in range(length)])
    check(await engine.attend(named("s"), episodes), of_the_rest(tokens[:length], replace(QUERY, mask=visible), first))
    await engine.close()
    store.close()


def run_of(position: int, store: Store) -> int | None:
    """The episode of a token, as the store has it."""
    row = store.get_session(named("s"))
    assert row is not None
    found = next(iter(store.read_blocks(row.sid, position, position + 1)), None)
    return None if found is None else found.episode


async def test_attends_and_appends_at_once_beyond_the_budget(make_engine: MakeEngine, sqlite_url: str) -> None:
    """Chunks are trimmed while attends wait for them, sessions while they are loaded; each sees what one length has."""
    max_tokens = 40 * SIZE
    store = open_store(sqlite_url)
    chunk_bytes = SIZE * DIM * 4
    engine = await make_engine(store, memory_budget_bytes=40 * chunk_bytes)
    tokens = {f"s{i}": vectors(i, 90 * SIZE, DIM) for i in range(3)}

    async def grow(name: str) -> None:
        for start in range(0, len(tokens[name]), 3):
            await engine.append(named(name), AppendRequest(embeddings=tokens[name][start : start + 3]))

    async def ask(name: str) -> None:
        while (await engine.inspect(named(name))).length < len(tokens[name]):
            result = await engine.attend(named(name), QUERY)
            if result.length:
                first = first_of(result.length, max_tokens)
                check(result, of_the_rest(tokens[name][: result.length], QUERY, first))

    async def seal() -> None:
        while any([(await engine.inspect(named(name))).length < len(rows) for name, rows in tokens.items()]):
            await engine.compaction.finish()
            await asyncio.sleep(0.001)  # a loop that never rests keeps the interpreter's lock from the threads

    for name in tokens:
        await create(engine, name, max_tokens)
    await asyncio.gather(*map(grow, tokens), *map(ask, tokens), *map(ask, tokens), seal())
    totals = (await engine.info()).totals
    assert totals["fetched_pages"] and totals["tokens"] <= 3 * max_tokens
    assert totals["trimmed_tokens"] > 0
    await engine.close()
    store.close()


async def test_nothing_grows_with_what_was_trimmed(make_engine: MakeEngine, sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    await create(engine)
    sizes = []
    for start in range(0, 3_000, 30):
        embeddings = vectors(start, 30, DIM)
        for row in embeddings.reshape(5, 6, DIM):
            await engine.append(named("s"), AppendRequest(embeddings=row, payloads=[b"{}"] * 6))
        await engine.attend(named("s"), QUERY)
        sizes.append((await engine.inspect(named("s"))).device_bytes)
    assert max(sizes) <= 16 * (SIZE + 1) * DIM * 4  # 3,000 tokens would be 600 of these
    session = session_of(engine, "s")
    assert len(list(store.read_blocks(session.sid))) <= 2 + MAX_TOKENS // 6
    assert len(session.resident.episodes) == 1
    await engine.close()
    store.close()


async def test_what_is_trimmed_while_a_fetch_is_on_its_way(make_engine: MakeEngine) -> None:
    """The store is ahead of the device for a moment: the attend is planned again and sees what is left."""
    store = MemoryStore()
    engine = await make_engine(store)
    await create(engine)
    tokens = vectors(2, 60, DIM)
    for start in range(0, 27, 3):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[start : start + 3]))
    await engine.compaction.finish()
    session = await go_cold(engine)
    await engine.chunks(named("s"))  # its keys are here now, its contents are not
    mask = np.arange(27) % 2 == 0
    loader, fetched = engine.worker.loader, list[Fetch]()

    def ahead(fetch: Fetch) -> None:
        if not fetched:
            (written,) = store.write([Append(session.sid, 11, tokens[27:38].tobytes(), trim_chunk=SIZE)], now=1.0)
            assert isinstance(written, Appended) and written.first_position == 10
        fetched.append(fetch)
        if len(fetched) == 4:
            new = Block(27, 11, tokens[27:38].tobytes(), None)
            publish(engine, session.resident, new, 10)
        load(fetch)

    load, loader.fetch = loader.fetch, ahead  # type: ignore[method-assign]
    whole, masked = await asyncio.gather(
        engine.attend(named("s"), QUERY), engine.attend(named("s"), replace(QUERY, mask=mask))
    )
    check(whole, of_the_rest(tokens[:38], QUERY, 10))
    check(masked, of_the_rest(tokens[:27], replace(QUERY, mask=mask), 10))
    assert len(fetched) >= 4


@pytest.mark.parametrize("keys", ["none", "of then", "of now"])
async def test_what_is_trimmed_before_a_load_is_not_missed(make_engine: MakeEngine, keys: str) -> None:
    """Even when all that the device knew of is gone by then. What it learns later it has already."""
    store = MemoryStore()
    engine = await make_engine(store)
    await create(engine)
    tokens = vectors(3, 90, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[:27], episode=4))
    if keys == "of then":
        await engine.compaction.finish()
    session = await go_cold(engine)
    summaries = store.read_summaries(session.sid)
    for start in (27, 47, 67):
        write = Append(session.sid, 20, tokens[start : start + 20].tobytes(), episode=5, trim_chunk=SIZE)
        store.write([write], now=1.0)
    if keys == "of now":
        means = tokens[60:85].reshape(5, SIZE, DIM).mean(axis=1)
        store.write([Compact(session.sid, Summary(12, 5, means.tobytes()), SIZE)], now=1.0)
    else:
        store.read_summaries = lambda sid: summaries  # type: ignore[method-assign]  # as if read before all that
    result = await engine.attend(named("s"), QUERY)
    check(result, of_the_rest(tokens[:87], QUERY, 60))
    for start, first in ((27, 20), (47, 40), (67, 60)):
        new = Block(start, 20, tokens[start : start + 20].tobytes(), 5)
        publish(engine, session.resident, new, first)
    check(await engine.attend(named("s"), QUERY), of_the_rest(tokens[:87], QUERY, 60))
    check(await engine.attend(named("s"), replace(QUERY, episodes=[5])), of_the_rest(tokens[:87], QUERY, 60))
    assert (await engine.inspect(named("s"))).first_position == 60


async def test_a_gap_that_is_no_trim_is_damage(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    await create(engine)
    for start in range(0, 30, 3):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(start, 3, DIM)))
    session = await go_cold(engine)
    blocks = list(store.read_blocks(session.sid))
    monkeypatch.setattr(store, "read_blocks", lambda *args: iter(blocks[3:]))
    with pytest.raises(Unhealthy, match="stored tokens begin at 10"):
        await engine.attend(named("s"), QUERY)
    with pytest.raises(Unhealthy, match="21 of the tokens 0 to 30 could be read"):
        await engine.read(named("s"), 0, None, embeddings=True, payloads=False)


async def test_a_read_that_a_trim_overtakes_gives_the_rest(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    await create(engine)
    tokens = vectors(5, 60, DIM)
    for start in range(0, 30, 3):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[start : start + 3]))
    session = session_of(engine, "s")
    read_blocks = store.read_blocks

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        store.write([Append(session.sid, 25, tokens[30:55].tobytes(), trim_chunk=SIZE)], now=1.0)
        return read_blocks(*args)

    monkeypatch.setattr(store, "read_blocks", late)
    memories = await engine.read(named("s"), 0, 28, embeddings=True, payloads=True)
    assert (memories.start, memories.stop) == (25, 28)
    np.testing.assert_array_equal(memories.embeddings, tokens[25:28])
    store.write([Append(session.sid, 5, tokens[55:60].tobytes(), trim_chunk=SIZE)], now=1.0)
    with pytest.raises(ChunkNotFound, match="chunk 4 of session 's' is being trimmed"):
        await engine.chunk(named("s"), 4, embeddings=True)


@pytest.mark.parametrize("embeddings", [True, False])
async def test_payloads_that_a_trim_overtakes_are_not_said_to_be_none(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, embeddings: bool
) -> None:
    """Bug: a read of payloads alone answered null for tokens that went meanwhile."""
    store = MemoryStore()
    engine = await make_engine(store)
    await create(engine)
    tokens, payloads = vectors(5, 60, DIM), [b'{"at": %d}' % position for position in range(60)]
    await engine.append(named("s"), AppendRequest(embeddings=tokens[:27], payloads=payloads[:27]))
    session = session_of(engine, "s")
    read_payload_range, ends = store.read_payload_range, [27, 45]

    def late(*args: Any) -> Any:
        if len(ends) > 1:
            start, stop = ends[0], ends[1]
            ends.pop(0)
            data, bodies = tokens[start:stop].tobytes(), payloads[start:stop]
            store.write([Append(session.sid, stop - start, data, bodies, trim_chunk=SIZE)], now=1.0)
        return read_payload_range(*args)

    monkeypatch.setattr(store, "read_payload_range", late)
    first = await engine.read(named("s"), 0, 27, embeddings=embeddings, payloads=True)
    assert (first.start, first.stop, first.payloads) == (15, 27, payloads[15:27])
    if embeddings:
        np.testing.assert_array_equal(first.embeddings, tokens[15:27])
    ends[:] = [45, 60]
    second = await engine.read(named("s"), 0, 27, embeddings=embeddings, payloads=True)
    assert (second.start, second.stop, second.payloads) == (30, 30, [])
    store.write([DeleteSession(session.sid)], now=1.0)
    with pytest.raises(SessionNotFound):
        await engine.read(named("s"), 0, 27, embeddings=embeddings, payloads=True)


@pytest.mark.parametrize("num_left", [12, 0])
async def test_an_attend_that_is_overtaken_by_trims(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_left: int
) -> None:
    """Bug: who named no `stop` was told that it was too early, when masks or parts had fixed the length."""
    engine = await make_engine(max_batch_products=1)
    await create(engine)
    tokens = vectors(2, 90, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[:27]))
    entered, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert let_go.wait(30)

    engine.worker.queue.post(hold)
    assert await asyncio.to_thread(entered.wait, 5)
    mask = np.arange(27) % 2 == 0
    requests = [
        QUERY,
        replace(QUERY, mask=mask),
        replace(QUERY, chunk_mask=np.ones(6, np.bool_)),
        replace(QUERY, stop=27),
    ]
    attends = [asyncio.ensure_future(engine.attend(named("s"), request)) for request in requests]
    await asyncio.sleep(0)
    new = tokens[27 : 42 if num_left else 57]
    session, store, length = session_of(engine, "s"), engine.store, 27
    for part in np.split(new, range(15, len(new), 15)):
        write = Append(session.sid, len(part), part.tobytes(), trim_chunk=SIZE)
        (written,) = store.write([write], now=1.0)
        assert isinstance(written, Appended)
        new = Block(length, len(part), part.tobytes(), None)
        publish(engine, session.resident, new, written.first_position)
        length += len(part)
    let_go.set()
    parts, masked, chunk_masked, stopped = await asyncio.gather(*attends, return_exceptions=True)
    if num_left:
        first = first_of(length)
        for request, result in ((QUERY, parts), (requests[1], masked), (requests[2], chunk_masked), (QUERY, stopped)):
            assert isinstance(result, AttendResult)
            check(result, of_the_rest(tokens[:27], request, first))
        return
    assert isinstance(parts, AttendResult)
    check(parts, of_the_rest(tokens[:length], QUERY, first_of(length)))
    for refused in (masked, chunk_masked):
        assert isinstance(refused, LengthConflict) and refused.extra["length"] == length
        assert "the masks are of 27 tokens, all of which were trimmed" in str(refused)
    assert isinstance(stopped, InvalidArgument) and "stop is 27, the session's tokens before" in str(stopped)


async def test_a_repeated_step_whose_tokens_were_trimmed_says_so(make_engine: MakeEngine) -> None:
    """Bug: it was told that its `stop` was too early, and had named none."""
    engine = await make_engine()
    await create(engine)
    tokens = vectors(2, 90, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[:9]))
    append = AppendRequest(embeddings=tokens[9:12], idempotency_key="k")
    await engine.step(named("s"), QUERY, append)
    for start in range(12, 62, 10):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[start : start + 10]))
    with pytest.raises(LengthConflict, match=r"made when the session's length was 9, and .* trimmed") as refused:
        await engine.step(named("s"), QUERY, append)
    assert refused.value.extra["length"] == 62


async def test_what_an_session_that_trims_refuses(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    for settings, message in (
        (CreateRequest(dim=DIM, on_full="evict_oldest"), "max_tokens is missing"),
        (CreateRequest(dim=DIM, max_tokens=31, on_full="evict_oldest"), "max_tokens is 31, it must be 32 to"),
        (CreateRequest(dim=DIM, on_full="forget"), "on_full is 'forget'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument, match=message):
            await engine.create(named("s"), settings)
    await create(engine)
    tokens = vectors(4, 90, DIM)
    with pytest.raises(InvalidArgument, match=f"append of 32 tokens .* max_tokens 31, so {MAX_APPEND} tokens"):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[:32]))
    for start in range(0, 81, 27):
        appended = await engine.append(named("s"), AppendRequest(embeddings=tokens[start : start + 27]))
        assert (appended.start, appended.length) == (start, start + 27)
    check(await engine.attend(named("s"), QUERY), of_the_rest(tokens[:81], QUERY, 50))
    with pytest.raises(ChunkNotFound, match="chunk 9 of session 's' was trimmed, its chunks begin with 10"):
        await engine.chunk(named("s"), 9)
    assert (await engine.chunk(named("s"), 10)).chunk.start == 50
    assert (await engine.read(named("s"), 0, 20, embeddings=True, payloads=True)).payloads == []


@pytest.mark.parametrize("seed", range(3))
def test_chunks_that_are_trimmed_are_as_those_that_are_not(seed: int) -> None:
    draw = np.random.default_rng(seed)
    budgets = [Budget(1 << 20), Budget(1 << 20)]
    whole, part = (Chunks(Arena(DIM, SIZE, torch.float32, torch.device("cpu"), budget), budget) for budget in budgets)
    for _ in range(120):
        tokens = torch.from_numpy(vectors(int(draw.integers(2**30)), int(draw.integers(1, 12)), DIM))
        whole.append(tokens)
        part.append(tokens)
        part.trim(max(0, whole.num_chunks - int(draw.integers(3, 9))))
        first, last = part.first_chunk, part.num_chunks
        assert (part.length, last) == (whole.length, whole.num_chunks) and part.first_position == first * SIZE
        torch.testing.assert_close(part.keys, whole.keys[first:], rtol=0, atol=0)
        sealed = torch.arange(first, whole.num_sealed)
        torch.testing.assert_close(part.contents(sealed), whole.contents(sealed), rtol=0, atol=0)
        dropped = [chunk for chunk in part.offloadable().tolist() if draw.random() < 0.2]
        contents = part.contents(torch.tensor(dropped, dtype=torch.int64))
        part.offload(dropped)
        assert part.missing(range(last)) == dropped and part.num_missing == len(dropped)
        kept = [chunk for chunk in dropped if draw.random() < 0.5]
        part.trim(min(kept, default=first))
        part.put(part.missing(dropped), contents[len(dropped) - len(part.missing(dropped)) :])
        assert part.num_missing == 0
    assert part.device_bytes < 40 * SIZE * DIM * 4 < whole.device_bytes
    part.free()
    assert budgets[1].used_bytes == 0
