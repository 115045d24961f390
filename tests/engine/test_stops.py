"""`stop` for each query: a whole trajectory in one attend, each query with its own past, as by single calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.errors import InvalidArgument
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest
from storage.base import Store
from storage.in_memory import MemoryStore
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, session_of
from tests.engine.models import write_model
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.names import named

LENGTH = 8 * SIZE + 3


async def check(engine: Engine, stops: list[int], name: str = "s", **fields: Any) -> None:
    """One attend answers each query as a call of its own with that `stop` and the masks up to it."""
    queries = vectors(9, len(stops), DIM)
    request = AttendRequest(queries=queries, stop=max(stops), stops=tuple(stops), tokens=True, **fields)
    whole = await engine.attend(named(name), request)
    singles = [await engine.attend(named(name), one(queries, stops, row, fields)) for row in range(len(stops))]
    for row, single in enumerate(singles):
        equal(whole, row, single)


def one(queries: Any, stops: list[int], row: int, fields: dict[str, Any]) -> AttendRequest:
    own = dict(fields)
    num_chunks = -(-stops[row] // SIZE)
    if "mask" in own:
        own["mask"] = own["mask"][: stops[row]]
    if "chunk_mask" in own:
        chunk_mask = own["chunk_mask"]
        own["chunk_mask"] = (chunk_mask if chunk_mask.ndim == 1 else chunk_mask[row])[:num_chunks]
    return AttendRequest(queries=queries[row : row + 1], stop=stops[row], tokens=True, **own)


def equal(whole: AttendResult, row: int, single: AttendResult) -> None:
    width = single.chunk_index.shape[1]
    np.testing.assert_allclose(whole.output[row], single.output[0], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(whole.chunk_index[row, :width], single.chunk_index[0])
    assert (whole.chunk_index[row, width:] == -1).all() and not whole.chunk_weight[row, width:].any()
    np.testing.assert_allclose(whole.chunk_weight[row, :width], single.chunk_weight[0], atol=1e-5)
    assert whole.recalled is not None and single.recalled is not None
    assert [token.position for token in whole.recalled[row]] == [token.position for token in single.recalled[0]]


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "few chunks": {"top_k": 2},
    "from a start": {"start": 7},
    "an episode": {"episodes": (1, 3)},
    "masked": {"mask": np.arange(LENGTH) % 3 != 1},
    "nothing of most chunks": {"mask": np.arange(LENGTH) >= 17},
    "chunks": {"chunk_mask": np.arange(9) % 2 == 0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["retrieval", "plain", "block"])
async def test_every_stop_is_answered_as_alone(make_engine: MakeEngine, tmp_path: Path, case: str, model: str) -> None:
    for name in ("plain", "block"):
        write_model(tmp_path / f"{name}.safetensors", dim=DIM, heads=3, dim_head=7, block=name == "block")
    engine = await make_engine(models_dir=tmp_path)
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, model=model))
    for number, tokens in enumerate(np.array_split(vectors(1, LENGTH + 4, DIM), 5)):
        await engine.append(named("s"), AppendRequest(tokens, episode=number))
    fields = CASES[case]
    await check(engine, list(range(fields.get("start", 0), LENGTH + 1)), **fields)
    await check(engine, [LENGTH, 11, 10, 11, 42], **fields)


async def test_a_chunk_mask_for_each_query(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, LENGTH, DIM))
    stops = list(range(LENGTH + 1))
    await check(engine, stops, chunk_mask=np.random.default_rng(3).random((len(stops), 9)) < 0.6)


async def test_an_open_chunk_that_is_excluded(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, LENGTH, DIM), open_chunk="exclude")
    await check(engine, list(range(LENGTH + 1)))


async def test_a_session_that_trims_and_one_that_grows(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, 4, DIM), max_tokens=20, on_full="evict_oldest")
    for token in vectors(2, 40, DIM):
        await engine.append(named("s"), AppendRequest(token))
    first = session_of(engine, "s").first_position
    assert first > 0
    await check(engine, list(range(first, 45)))
    with pytest.raises(InvalidArgument, match=f"stop is {first - 1}, the session's tokens before {first} were trimmed"):
        await check(engine, [30, first - 1])
    await fill(engine, "grows", vectors(1, 30, DIM))

    async def grow() -> None:
        for token in vectors(3, 30, DIM):
            await engine.append(named("grows"), AppendRequest(token))

    await asyncio.gather(grow(), *(check(engine, list(range(31)), "grows") for _ in range(4)))


@pytest.mark.parametrize("fields", [{}, {"mask": np.arange(400) % 3 != 1}])
async def test_what_is_not_on_the_device_is_fetched(make_engine: MakeEngine, fields: dict[str, Any]) -> None:
    """A budget of few pages: the chunks in which queries end are read from the store, and their keys kept."""
    store: Store = MemoryStore()
    engine = await make_engine(store, memory_budget_bytes=40 << 10)
    await fill(engine, "s", vectors(1, 400, DIM))
    await fill(engine, "other", vectors(2, 400, DIM))
    await engine.attend(named("other"), AttendRequest(queries=vectors(3, 1, DIM), top_k=64))
    await go_cold(engine, "s")
    before = engine.worker.cache.num_fetched_pages
    await check(engine, list(range(0, 401, 7)), top_k=2, **({"mask": fields["mask"][:399]} if fields else {}))
    assert engine.worker.cache.num_fetched_pages > before


async def test_in_parts(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_batch_products=8 << 20)
    await fill(engine, "s", vectors(1, LENGTH, DIM))
    await check(engine, list(range(LENGTH + 1)))
    assert engine.worker.queue.num_batches > LENGTH + 5


async def test_what_is_wrong(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, LENGTH, DIM))
    queries = vectors(2, 2, DIM)
    for stops, fields, message in (
        ((3,), {}, "stop has 1 values, there are 2 queries"),
        ((3, -1), {}, "the lowest stop is -1"),
        ((3, LENGTH + 1), {}, f"stop is {LENGTH + 1}, the session's length is {LENGTH}"),
        ((9, 3), {"start": 4}, "start is 4, it must be at most 3"),
        ((9, 3), {"mask": np.ones(3, np.bool_)}, r"mask has shape \[3\], it must be \[9\]"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            await engine.attend(
                named("s"), AttendRequest(queries=queries, stop=max(stops), stops=stops, **dict[str, Any](fields))
            )


async def test_a_repeated_step_sees_nothing_that_came_later(make_engine: MakeEngine) -> None:
    """Asked anew with a later stop for each query, a repeated step saw the tokens that it had itself appended."""
    engine = await make_engine()
    await engine.create(named("s"), CreateRequest(dim=3, chunk_size=4))
    rows = np.eye(3, dtype=np.float32)
    await engine.append(named("s"), AppendRequest(rows[:2]))
    append = AppendRequest(rows[2:], idempotency_key="key")
    first = await engine.step(named("s"), AttendRequest(queries=rows), append)
    again = await engine.step(named("s"), AttendRequest(queries=rows, stop=3, stops=(3, 3, 3)), append)
    np.testing.assert_allclose(again[0].output, first[0].output, atol=1e-6)
    assert again[1].start == first[1].start == 2
