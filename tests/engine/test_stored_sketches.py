"""Sketches at rest: what was made for one search is there for the first one after a restart, or after going cold."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from htm_service.engine import Engine
from htm_service.memory.chunks import Chunks
from htm_service.memory.sketches.code import FORMAT, Rotation, sketch
from htm_service.memory.sketches.table import SketchTable
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SearchRequest
from storage.base import Block, Store, Summary
from storage.resolve import open_readonly, open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, session_of
from tests.engine.test_attend import vectors
from tests.names import named

DIM, SIZE, NUM_CHUNKS = 131, 7, 400
TOKENS = vectors(1, NUM_CHUNKS * SIZE + 3, DIM)
REQUEST = SearchRequest(TOKENS[5] + TOKENS[6], num_wanted=2)
FEW = 40
"""Chunks, of 400, with tokens that may be among the best two: what is scored. See `reads/search`."""


@pytest.fixture(params=["memory://", "sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory://":
        return str(request.param)
    return str(request.getfixturevalue(f"{request.param}_url"))


class Reads:
    """What is read of a store."""

    def __init__(self, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.num_chunks = self.num_sketched = 0
        read_ranges, read_sketches = store.read_ranges, store.read_sketches

        def counted(ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Block]]:
            self.num_chunks += sum(stop - start for _, start, stop in ranges) // SIZE
            return read_ranges(ranges)

        def counted_too(sid: int, version: int) -> Iterator[Summary]:
            self.num_sketched += 1
            return read_sketches(sid, version)

        patch.setattr(store, "read_ranges", counted)
        patch.setattr(store, "read_sketches", counted_too)


async def fill(engine: Engine, name: str = "s", tokens: Any = TOKENS, **options: Any) -> None:
    await engine.create(named(name), CreateRequest(dim=DIM, chunk_size=SIZE, **options))
    await engine.append(named(name), AppendRequest(embeddings=tokens))


async def search(engine: Engine, name: str = "s") -> list[int]:
    return sorted((await engine.search(named(name), REQUEST)).position[0].tolist())


def table_of(engine: Engine, name: str = "s") -> SketchTable | None:
    return session_of(engine, name).resident.held.sketches


@pytest.mark.parametrize("is_searched_before", [True, False])
@pytest.mark.parametrize("how", ["restart", "cold"])
async def test_the_first_search_reads_what_it_scores(
    make_engine: MakeEngine, url: str, how: str, is_searched_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a session larger than the device it read all. It still does where nobody searched it before."""
    store = open_store(url)
    engine = await make_engine(store, memory_budget_bytes=150 * SIZE * DIM * 4)
    await fill(engine)
    if is_searched_before:
        assert await search(engine) == [5, 6]
    await engine.compaction.finish()
    if how == "restart" and url != "memory://":
        await engine.close()
        store.close()
        store = open_store(url)
        engine = await make_engine(store, memory_budget_bytes=150 * SIZE * DIM * 4)
    else:
        await go_cold(engine)
    reads = Reads(store, monkeypatch)
    assert await search(engine) == [5, 6]
    table = table_of(engine)
    assert table is not None and table.num_known == NUM_CHUNKS
    if is_searched_before:
        assert reads.num_chunks < FEW and table.num_unkept == 0
    else:
        assert reads.num_chunks >= NUM_CHUNKS
    assert list(store.verify()) == []


async def test_who_does_not_search_reads_and_writes_no_sketches(
    make_engine: MakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(url)
    engine = await make_engine(store)
    reads = Reads(store, monkeypatch)
    for name in ("searched", "attended"):
        await fill(engine, name)
    await search(engine, "searched")
    assert reads.num_sketched == 0, "there can be none"
    await engine.compaction.finish()
    kept = {name: list(store.read_sketches(session_of(engine, name).sid, FORMAT)) for name in ("searched", "attended")}
    assert sum(one.num_chunks for one in kept["searched"]) == NUM_CHUNKS and kept["attended"] == []
    assert sum(len(one.data) for one in kept["searched"]) == NUM_CHUNKS * SIZE * (192 // 8 + 4)
    for name in kept:
        await go_cold(engine, name)
    reads.num_sketched = 0
    for name in kept:
        await engine.attend(named(name), AttendRequest(queries=TOKENS[:1]))
        assert table_of(engine, name) is None
    assert reads.num_sketched == 0
    for _ in range(3):
        await search(engine, "searched")
    assert reads.num_sketched == 1


async def test_upkeep_keeps_whole_portions_and_a_stop_the_rest(make_engine: MakeEngine) -> None:
    store = open_store("memory://")
    engine = await make_engine(store)
    await fill(engine, tokens=vectors(1, 1_500 * SIZE, DIM))
    await search(engine)
    while await engine.compaction.compact_once():
        pass
    sid = session_of(engine, "s").sid
    portion = 4_096 // SIZE
    assert [(one.first, one.num_chunks) for one in store.read_sketches(sid, FORMAT)] == [
        (0, portion),
        (portion, portion),
    ]
    table = table_of(engine)
    assert table is not None and table.num_unkept == 1_500 - 2 * portion
    await engine.compaction.finish()
    assert sum(one.num_chunks for one in store.read_sketches(sid, FORMAT)) == 1_500


async def test_a_fork_has_its_parents(make_engine: MakeEngine, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs nothing until the child is searched."""
    store = open_store(url)
    engine = await make_engine(store, memory_budget_bytes=150 * SIZE * DIM * 4)
    await fill(engine)
    await search(engine)
    await engine.compaction.finish()
    await engine.fork(named("s"), named("child"), 300 * SIZE + 5)
    await engine.append(named("child"), AppendRequest(embeddings=-TOKENS[: 20 * SIZE]))
    await engine.attend(named("child"), AttendRequest(queries=TOKENS[:1]))
    assert table_of(engine, "child") is None
    reads = Reads(store, monkeypatch)
    assert await search(engine, "child") == [5, 6]
    assert reads.num_chunks < FEW + 30
    await engine.compaction.finish()
    await engine.delete(named("s"))
    await go_cold(engine, "child")
    reads.num_chunks = 0
    assert await search(engine, "child") == [5, 6]
    table = table_of(engine, "child")
    assert table is not None and table.num_known == 320 and table.num_unkept == 0
    assert reads.num_chunks < FEW
    assert list(store.verify()) == []


async def test_trimmed_and_truncated_tokens_take_theirs_along(make_engine: MakeEngine, url: str) -> None:
    """Positions are given again: what was kept of tokens that are gone says nothing of the new ones."""
    store = open_store(url)
    engine = await make_engine(store)
    await fill(engine, tokens=TOKENS[: 200 * SIZE], max_tokens=200 * SIZE, on_full="evict_oldest")
    await search(engine)
    await engine.compaction.finish()
    await engine.append(named("s"), AppendRequest(embeddings=TOKENS[200 * SIZE : 250 * SIZE]))
    sid = session_of(engine, "s").sid
    assert [one.first for one in store.read_sketches(sid, FORMAT)] == [50]
    await engine.truncate(named("s"), 150 * SIZE + 2)
    kept = list(store.read_sketches(sid, FORMAT))
    assert (kept[0].first, kept[-1].first + kept[-1].num_chunks) == (50, 150)
    new = 2 * vectors(9, 40 * SIZE, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=new))
    await search(engine)
    await engine.compaction.finish()
    await go_cold(engine)
    result = await engine.search(named("s"), SearchRequest(new[30:34], num_wanted=1))
    assert result.position[:, 0].tolist() == [150 * SIZE + 2 + at for at in range(30, 34)]
    table = table_of(engine)
    assert table is not None and (table.num_known, table.num_unkept) == (140, 0)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE sketches SET data = zeroblob(length(data)) WHERE first = 0",
        "UPDATE sketches SET version = 999",
        "DELETE FROM sketches WHERE first = 0",
    ],
)
async def test_what_is_damaged_or_of_another_format_is_made_again_and_kept(
    make_engine: MakeEngine, sqlite_url: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store, memory_budget_bytes=150 * SIZE * DIM * 4)
    await fill(engine)
    await search(engine)
    await engine.close()  # which keeps them
    store.close()
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(damage).rowcount > 0
    for is_whole in (False, True):
        store = open_store(sqlite_url)
        engine = await make_engine(store, memory_budget_bytes=150 * SIZE * DIM * 4)
        with monkeypatch.context() as patch:
            reads = Reads(store, patch)
            assert await search(engine) == [5, 6]
        assert (reads.num_chunks < FEW) == is_whole
        table = table_of(engine)
        assert table is not None and table.num_known == NUM_CHUNKS and (table.num_unkept == 0) == is_whole
        await engine.close()
        store.close()
    with contextlib.closing(open_readonly(path)) as read:
        assert list(read.verify()) == []


@pytest.mark.parametrize("what", ["truncate", "cold", "delete", "broken"])
async def test_what_comes_while_they_are_read(
    make_engine: MakeEngine, sqlite_url: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    await fill(engine)
    await search(engine)
    await engine.compaction.finish()
    await go_cold(engine)
    began, may_go = threading.Event(), threading.Event()
    read: Callable[[int, int], Iterator[Summary]] = store.read_sketches

    def slow(sid: int, version: int) -> Iterator[Summary]:
        stored = list(read(sid, version))
        began.set()
        may_go.wait(20)
        if what == "broken":
            raise OSError("no")
        return iter(stored)

    monkeypatch.setattr(store, "read_sketches", slow)
    work = asyncio.gather(*(engine.search(named("s"), REQUEST) for _ in range(5)), return_exceptions=True)
    await asyncio.to_thread(began.wait, 20)
    if what == "truncate":
        await engine.truncate(named("s"), 0)
        await engine.append(named("s"), AppendRequest(embeddings=TOKENS[::-1].copy()))
    elif what == "cold":
        await go_cold(engine)
    elif what == "delete":
        await engine.delete(named("s"))
    may_go.set()
    for outcome in await work:
        if what == "delete":
            assert isinstance(outcome, Exception) and "there is no session" in str(outcome)
            continue
        assert not isinstance(outcome, BaseException), outcome
        last = len(TOKENS) - 1
        assert sorted(outcome.position[0].tolist()) == ([last - 6, last - 5] if what == "truncate" else [5, 6])
    if what != "delete":
        table = table_of(engine)
        assert table is not None and table.num_known == NUM_CHUNKS
        assert (table.num_unkept == 0) == (what == "cold"), "else they were made of the tokens that are there now"


async def expect_sketches_of(engine: Engine, name: str, tokens: Any) -> None:
    """Those on the device are what these tokens, all that the session ever had, give."""

    def look(chunks: Chunks) -> tuple[int, int, Tensor, Tensor, Tensor] | None:
        first, last, table = chunks.first_chunk, chunks.num_sealed, chunks.sketches
        if table is None:
            return None
        bits, factors = table.tables(first, last)
        return first, last, chunks.keys[: last - first].clone(), bits.clone(), factors.clone()

    looked = await engine.worker.ask(session_of(engine, name).resident, look)
    assert looked is not None
    first, last, keys, bits, factors = looked
    held = torch.from_numpy(tokens[first * SIZE : last * SIZE]).view(-1, SIZE, DIM)
    wanted, wanted_factors = sketch(held, keys, Rotation(DIM, torch.device("cpu")))
    is_known = ~factors[:, 0].isnan()
    assert torch.equal(bits[is_known], wanted[is_known])
    torch.testing.assert_close(factors[is_known], wanted_factors[is_known])


@pytest.mark.parametrize("seed", range(2))
async def test_in_any_order_of_everything_they_are_those_of_the_tokens(
    make_engine: MakeEngine, url: str, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    store = open_store(url)
    engine = await make_engine(store, memory_budget_bytes=120 * SIZE * DIM * 4)
    held = {"s0": np.zeros((0, DIM), np.float32), "s1": np.zeros((0, DIM), np.float32)}
    await engine.create(named("s0"), CreateRequest(dim=DIM, chunk_size=SIZE))
    trims: dict[str, Any] = {"max_tokens": 20 * SIZE, "on_full": "evict_oldest"}
    await engine.create(named("s1"), CreateRequest(dim=DIM, chunk_size=SIZE, **trims))
    num_read = 0
    for _ in range(150):
        name = str(draw.choice(list(held)))
        tokens = held[name]
        what = draw.choice(["append", "append", "truncate", "fork", *["search"] * 3, "cold", "keep", "restart"])
        first = (await engine.inspect(named(name))).first_position
        length = int(draw.integers(first, len(tokens) + 1))
        if what == "append":
            new = draw.standard_normal((int(draw.integers(1, 70)), DIM)).astype(np.float32)
            await engine.append(named(name), AppendRequest(embeddings=new))
            held[name] = np.concatenate([tokens, new])
        elif what == "truncate":
            await engine.truncate(named(name), length)
            held[name] = tokens[:length]
        elif what == "fork" and len(held) < 6:
            held[child := f"s{len(held)}"] = tokens[:length]
            await engine.fork(named(name), named(child), length)
        elif what == "cold":
            await go_cold(engine, name)
        elif what == "keep":
            await engine.compaction.finish()
        elif what == "restart" and url.startswith("sqlite"):
            await engine.close()
            store.close()
            store = open_store(url)
            engine = await make_engine(store, memory_budget_bytes=120 * SIZE * DIM * 4)
        elif what == "search" and len(tokens):
            await engine.search(named(name), SearchRequest(draw.standard_normal((1, DIM)).astype(np.float32)))
            await expect_sketches_of(engine, name, tokens)
            table = table_of(engine, name)
            num_read += table is not None and table.num_known > table.num_unkept
    assert num_read > 10
    assert list(store.verify()) == []
