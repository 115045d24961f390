"""Attends that cost more than a batch may: done in parts, answered as a whole, and others come between."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from htm_service.errors import DeadlineExceeded, InvalidArgument
from htm_service.reads.cost import PRODUCTS_OF_ANY_QUERY
from htm_service.reads.runner import Attend
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest, SelectResult
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.names import named

TWO_QUERIES = 3 * PRODUCTS_OF_ANY_QUERY
"""A batch that has room for two queries and some."""


def assert_same(got: AttendResult, expected: AttendResult) -> None:
    np.testing.assert_allclose(got.output, expected.output, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.chunk_index, expected.chunk_index)
    np.testing.assert_allclose(got.chunk_weight, expected.chunk_weight, atol=1e-6)
    assert got.length == expected.length


async def test_parts_answer_as_the_whole(make_engine: MakeEngine) -> None:
    whole, parted = await make_engine(), await make_engine(max_batch_products=TWO_QUERIES)
    tokens, queries = vectors(0, 47, DIM), vectors(1, 9, DIM)
    for engine in (whole, parted):
        await fill(engine, "s", tokens)
    masks = np.random.default_rng(2).random((9, 10)) < 0.6
    for fields in ({}, {"chunk_mask": masks}, {"chunk_mask": masks[0]}, {"stop": 33, "start": 4}, {"payloads": True}):
        request = AttendRequest(queries=queries, **dict[str, Any](fields))
        expected, got = await whole.attend(named("s"), request), await parted.attend(named("s"), request)
        assert_same(got, expected)
        assert (got.recalled is None) == (expected.recalled is None)
        if got.recalled is not None and expected.recalled is not None:
            assert [[token.position for token in row] for row in got.recalled] == [
                [token.position for token in row] for row in expected.recalled
            ]
    assert parted.worker.queue.num_batches >= 5 * 5 > whole.worker.queue.num_batches


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
async def test_a_chunk_mask_of_other_rows_is_refused(make_engine: MakeEngine, rows: int) -> None:
    """One with as many rows as a part has queries was once taken, and the refusal of others named a part's rows."""
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    await fill(engine, "s", vectors(0, 47, DIM))
    request = AttendRequest(queries=vectors(1, 8, DIM), chunk_mask=np.ones((rows, 10), np.bool_))
    with pytest.raises(InvalidArgument, match=rf"shape \[{rows}, 10\], .* one row for each of 8 queries"):
        await engine.attend(named("s"), request)


async def test_all_parts_have_one_deadline(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part once had the whole time for itself."""
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    await fill(engine, "s", vectors(0, 47, DIM))
    run = engine.worker.runner.run

    def slow(reads: Sequence[Attend]) -> list[AttendResult | SelectResult | Exception]:
        time.sleep(0.1)
        return run(reads)

    monkeypatch.setattr(engine.worker.runner, "run", slow)
    with pytest.raises(DeadlineExceeded, match="300 ms"):
        await engine.attend(named("s"), AttendRequest(queries=vectors(1, 14, DIM), timeout_s=0.3))


async def test_all_parts_see_one_length(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    await fill(engine, "s", vectors(0, 3, DIM))
    queries = vectors(1, 64, DIM)

    async def grow() -> None:
        for token in vectors(2, 40, DIM):
            await engine.append(named("s"), AppendRequest(embeddings=token))

    growing = asyncio.create_task(grow())
    results = [await engine.attend(named("s"), AttendRequest(queries=queries)) for _ in range(4)]
    await growing
    for result in results:
        then = await engine.attend(named("s"), AttendRequest(queries=queries, stop=result.length))
        assert_same(result, then._replace(length=result.length))


async def test_a_small_attend_is_not_kept_waiting_by_a_large_one(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    for name in ("large", "small"):
        await engine.create(named(name), CreateRequest(dim=DIM, chunk_size=SIZE))
        await engine.append(named(name), AppendRequest(embeddings=vectors(0, 20, DIM)))
    large = asyncio.create_task(engine.attend(named("large"), AttendRequest(queries=vectors(1, 1_000, DIM))))
    await asyncio.sleep(0)
    for _ in range(5):
        await engine.attend(named("small"), AttendRequest(queries=vectors(2, 1, DIM)))
    assert not large.done()
    assert (await large).output.shape == (1_000, DIM)


async def test_attends_are_counted_not_their_parts(make_engine: MakeEngine) -> None:
    """`attends` of `GET /v1/info` counted each part, and every look at a session's chunks."""
    engine = await make_engine(max_batch_products=TWO_QUERIES)
    await fill(engine, "s", vectors(0, 47, DIM))
    await engine.attend(named("s"), AttendRequest(queries=vectors(1, 9, DIM)))
    await engine.attend(named("s"), AttendRequest(queries=vectors(1, 1, DIM)))
    await engine.step(
        named("s"), AttendRequest(queries=vectors(1, 1, DIM)), AppendRequest(embeddings=vectors(2, 1, DIM))
    )
    await engine.chunks(named("s"))
    with pytest.raises(InvalidArgument):
        await engine.attend(named("s"), AttendRequest(queries=vectors(1, 1, DIM), stop=99))
    await engine.delete(named("s"))
    assert (await engine.info()).totals["attends"] == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("room", [9, 3])
async def test_all_parts_begin_where_the_others_do(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, masked: bool, room: int
) -> None:
    """A trim between two parts left the queries of one answer with different tokens. Once it was cut so it is done
    whole, where the budget has room for that; else in parts again.
    """
    bytes_of_query = 8 * SIZE * DIM * 4  # of top_k chunks
    engine = await make_engine(max_batch_products=TWO_QUERIES, memory_budget_bytes=2 * room * bytes_of_query)
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=30, on_full="evict_oldest"))
    tokens = vectors(0, 60, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[:25]))
    await engine.append(named("s"), AppendRequest(embeddings=tokens[25:30]))
    run, loop, sizes = engine.worker.runner.run, asyncio.get_running_loop(), list[int]()

    def trim_between(attends: Sequence[Attend]) -> list[AttendResult | SelectResult | Exception]:
        results = run(attends)
        sizes.extend(len(attend.request.queries) for attend in attends)
        if len(sizes) == 1:
            adding = engine.append(named("s"), AppendRequest(embeddings=tokens[30:36]))
            asyncio.run_coroutine_threadsafe(adding, loop).result(timeout=60)
        return results

    monkeypatch.setattr(engine.worker.runner, "run", trim_between)
    fields: dict[str, Any] = {"mask": np.ones(30, np.bool_)} if masked else {}
    result = await engine.attend(named("s"), AttendRequest(queries=vectors(1, 9, DIM), **fields))
    assert (await engine.inspect(named("s"))).first_position == 10
    length = 30 if masked or room == 3 else 36
    assert result.length == length
    expected = await engine.attend(named("s"), AttendRequest(queries=vectors(1, 9, DIM), stop=length))
    assert_same(result, expected._replace(length=length))
    parts = [2, 2, 2, 2, 1]
    assert sizes[: 5 + (1 if room == 9 else 5)] == [*parts, *([9] if room == 9 else parts)]
