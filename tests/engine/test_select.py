"""Selects: which chunks queries in key space take, by the definition, with their keys and tokens as they are."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htm_service.config import MAX_SELECTED_CHUNKS, EngineConfig
from htm_service.engine import Engine
from htm_service.errors import InvalidArgument, LengthConflict, SessionNotFound
from htm_service.reads import runner
from htm_service.reads.runner import Attend
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest, SelectResult
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold
from tests.engine.test_attend import DIM, SIZE, fill, random_request, vectors
from tests.engine.test_parts import TWO_QUERIES
from tests.names import named

Result = AttendResult | SelectResult | Exception


def visible_tokens(length: int, request: AttendRequest, open_chunk: str, episodes: Any = None) -> Any:
    """[n] bool, by the definition."""
    stop = length if request.stop is None else request.stop
    visible = np.arange(length) >= request.start
    visible[stop:] = False
    if request.mask is not None:
        visible[:stop] &= request.mask
    if request.episodes is not None:
        visible &= np.isin(episodes, request.episodes)
    if open_chunk == "exclude":
        visible[stop // SIZE * SIZE :] = False
    return visible


def check(result: SelectResult, tokens: Any, visible: Any, request: AttendRequest, top_k: int) -> None:
    """`tokens` [n, D] as they are stored, `visible` [n]."""
    num_chunks = -(-len(tokens) // SIZE)
    shown = np.zeros((num_chunks, SIZE), bool)
    shown.reshape(-1)[: len(tokens)] = visible
    chunks = np.zeros((num_chunks, SIZE, DIM), np.float32)
    chunks.reshape(-1, DIM)[: len(tokens)] = tokens
    chunks[~shown] = 0
    keys = chunks.astype(np.float64).sum(axis=1) / np.maximum(shown.sum(axis=1), 1)[:, None]
    for row, query in enumerate(request.queries):
        allowed = np.array([chunk.any() for chunk in shown])
        if request.chunk_mask is not None:
            mask = np.atleast_2d(request.chunk_mask)
            of_row = mask[row if len(mask) > 1 else 0]
            allowed[: len(of_row)] &= of_row
        logits = {chunk: float(keys[chunk] @ query) for chunk in np.flatnonzero(allowed)}
        best = sorted(logits, key=lambda chunk: (-logits[chunk], chunk))[:top_k]
        taken = result.chunk_index[row][result.chunk_index[row] >= 0]
        assert taken.tolist() == best
        np.testing.assert_allclose(
            result.chunk_logit[row][: len(best)], [logits[c] for c in best], rtol=1e-4, atol=1e-5
        )
        assert not result.chunk_logit[row][len(best) :].any() and (result.chunk_index[row][len(best) :] == -1).all()
    index = np.unique(result.chunk_index[result.chunk_index >= 0])
    assert result.taken is not None and result.taken.tokens is not None and result.taken.key is not None
    np.testing.assert_array_equal(result.taken.index, index)
    np.testing.assert_array_equal(result.taken.visible, shown[index])
    np.testing.assert_array_equal(result.taken.tokens, chunks[index])
    np.testing.assert_allclose(result.taken.key, keys[index], atol=1e-6)
    assert result.taken.tokens.dtype == result.taken.key.dtype == result.chunk_logit.dtype == np.float32


@given(seed=st.integers(0, 2**20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_kind_of_request_equals_the_definition(seed: int) -> None:
    """Random sessions, dtypes, ranges, masks and episodes, many requests at once, among attends, whole and in parts."""
    draw = np.random.default_rng(seed)

    async def run() -> None:
        limits: dict[str, Any] = {"max_batch_products": TWO_QUERIES} if draw.random() < 0.3 else {}
        engine = Engine(EngineConfig(device="cpu", **limits), open_store("memory://"))
        await engine.start()
        dtype = str(draw.choice(["float32", "float16", "bfloat16"]))
        tokens = vectors(seed, int(draw.integers(1, 40)), DIM)
        cut = int(draw.integers(0, len(tokens) + 1))
        open_chunk = str(draw.choice(["attend", "exclude"]))
        await fill(engine, "s", tokens[:0], open_chunk=open_chunk, dtype=dtype)
        for episode, part in enumerate((tokens[:cut], tokens[cut:])):
            if len(part):
                await engine.append(named("s"), AppendRequest(embeddings=part, episode=episode))
        episodes = np.arange(len(tokens)) >= cut
        requests = [
            replace(random_request(draw, len(tokens)), model=None, episodes=[1] if draw.random() < 0.2 else None)
            for _ in range(6)
        ]
        work = [engine.select(named("s"), request) for request in requests]
        results, _ = await asyncio.gather(
            asyncio.gather(*work), asyncio.gather(*(engine.attend(named("s"), one) for one in requests))
        )
        await engine.close()
        stored = torch.from_numpy(tokens).to(getattr(torch, dtype)).float().numpy()
        for request, result in zip(requests, results, strict=True):
            assert result.length == len(tokens)
            visible = visible_tokens(len(tokens), request, open_chunk, episodes)
            check(result, stored, visible, request, request.top_k or 8)

    asyncio.run(run())


async def test_it_takes_what_an_attend_takes(engine: Engine) -> None:
    """The model `retrieval` scales by 20, which changes no order."""
    await fill(engine, "s", vectors(0, 47, DIM))
    request = AttendRequest(queries=vectors(1, 7, DIM), top_k=3)
    attended, selected = await engine.attend(named("s"), request), await engine.select(named("s"), request)
    np.testing.assert_array_equal(selected.chunk_index, attended.chunk_index)


async def test_what_is_not_asked_for_is_neither_answered_nor_read(make_engine: MakeEngine, sqlite_url: str) -> None:
    """Nor does it count as a recall."""
    engine = await make_engine(open_store(sqlite_url))
    tokens = vectors(0, 47, DIM)
    await fill(engine, "s", tokens)
    await engine.compaction.finish()  # so that the keys are in the store
    await go_cold(engine)
    request = AttendRequest(queries=vectors(1, 3, DIM), top_k=2)
    only = await engine.select(named("s"), request, keys=False, tokens=False)
    assert only.taken is None and only.chunk_index.shape == only.chunk_logit.shape == (3, 2)
    keys = await engine.select(named("s"), request, tokens=False)
    assert keys.taken is not None and keys.taken.key is not None
    assert keys.taken.tokens is None and keys.taken.visible is None
    assert engine.worker.cache.num_fetched_pages == 0
    check(await engine.select(named("s"), request), tokens, np.ones(47, bool), request, 2)
    assert engine.worker.cache.num_fetched_pages > 0
    info = await engine.inspect(named("s"))
    assert info.num_attends == info.num_queries == 0 and not await engine.recalls(named("s"))


@pytest.mark.parametrize("parts", [False, True])
async def test_an_empty_session_and_one_that_is_hidden(make_engine: MakeEngine, parts: bool) -> None:
    engine = await make_engine(**({"max_batch_products": TWO_QUERIES} if parts else {}))
    await fill(engine, "s", vectors(0, 0, DIM))
    request = AttendRequest(queries=vectors(1, 5, DIM))
    empty = await engine.select(named("s"), request)
    assert empty.chunk_index.shape == (5, 0) and empty.taken is not None
    await engine.append(named("s"), AppendRequest(embeddings=vectors(2, 7, DIM)))
    hidden = await engine.select(named("s"), replace(request, mask=np.zeros(7, np.bool_)))
    assert (hidden.chunk_index == -1).all() and hidden.taken is not None
    for result in (empty, hidden):
        assert result.taken is not None and result.taken.tokens is not None and result.taken.key is not None
        assert result.taken.tokens.shape == (0, SIZE, DIM) and result.taken.key.shape == (0, DIM)


@pytest.mark.parametrize("parts", [False, True])
async def test_an_answer_is_bounded(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, parts: bool) -> None:
    engine = await make_engine(**({"max_batch_products": TWO_QUERIES * 8} if parts else {}))
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=1))
    await engine.append(named("s"), AppendRequest(embeddings=vectors(0, MAX_SELECTED_CHUNKS + 400, DIM)))
    request = AttendRequest(queries=vectors(1, 200, DIM), top_k=256)
    with pytest.raises(
        InvalidArgument, match=r"take 4\d\d\d chunks, .* the limits of one select are 4096 and 268435456"
    ):
        await engine.select(named("s"), request, tokens=False)
    named_only = await engine.select(named("s"), request, keys=False, tokens=False)
    assert len(np.unique(named_only.chunk_index)) > MAX_SELECTED_CHUNKS
    monkeypatch.setattr(runner, "MAX_SELECTED_BYTES", 10 * DIM * 4)
    request = replace(request, queries=request.queries[:1], top_k=10)
    assert (await engine.select(named("s"), request, tokens=False)).taken is not None
    with pytest.raises(InvalidArgument, match=f"10 chunks, which have {20 * DIM * 4} bytes in the answer"):
        await engine.select(named("s"), request)


async def test_one_that_overflows_is_refused_alone(engine: Engine) -> None:
    tokens = vectors(0, 4 * SIZE, DIM)
    tokens[SIZE : 2 * SIZE] = 1e30
    await fill(engine, "s", tokens)
    large, small = np.full((2, DIM), 1e20, np.float32), vectors(1, 2, DIM)
    large[0] *= -1
    found = await asyncio.gather(
        engine.select(named("s"), AttendRequest(queries=large)),
        engine.select(named("s"), AttendRequest(queries=small)),
        return_exceptions=True,
    )
    assert isinstance(found[0], InvalidArgument) and "query of up to 1e+20 meets the summary key of chunk 1" in str(
        found[0]
    )
    assert isinstance(found[1], SelectResult) and found[1].chunk_index.shape == (2, 4)


async def test_what_is_trimmed_between_choosing_and_bringing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=30, on_full="evict_oldest"))
    await engine.append(named("s"), AppendRequest(embeddings=vectors(0, 30, DIM)))
    run, loop, num_batches = engine.worker.runner.run, asyncio.get_running_loop(), 0

    def trim_between(attends: Sequence[Attend]) -> list[Result]:
        nonlocal num_batches
        results = run(attends)
        num_batches += 1
        if num_batches == 3:  # of the parts of six queries
            adding = engine.append(named("s"), AppendRequest(embeddings=vectors(2, 12, DIM)))
            asyncio.run_coroutine_threadsafe(adding, loop).result(timeout=60)
        return results

    monkeypatch.setattr(engine.worker.runner, "run", trim_between)
    request = AttendRequest(queries=vectors(1, 6, DIM))
    with pytest.raises(LengthConflict, match="of the 6 chunks that the queries take, some are trimmed by now"):
        await engine.select(named("s"), request)
    assert (await engine.select(named("s"), request)).taken is not None


async def test_what_is_refused(engine: Engine) -> None:
    await fill(engine, "s", vectors(0, 11, DIM))
    for wrong in (
        {"top_k": 0},
        {"stop": 12},
        {"mask": np.ones(3, np.bool_)},
        {"chunk_mask": np.ones((2, 3), np.bool_)},
    ):
        with pytest.raises(InvalidArgument):
            await engine.select(named("s"), AttendRequest(queries=vectors(1, 1, DIM), **wrong))
    with pytest.raises(SessionNotFound):
        await engine.select(named("nobody"), AttendRequest(queries=vectors(1, 1, DIM)))
