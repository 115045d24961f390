"""Finite tokens and queries as large as there are: a session stays attendable, and who overflows is told alone."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from htm_service.engine import Engine
from htm_service.errors import InvalidArgument
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from storage.base import Compact, Summary
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold
from tests.engine.models import write_model
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.names import named
from tests.reference import htm_reference, relative_error

ZERO = AttendRequest(queries=np.zeros((1, 2), np.float32), tokens=True)


@pytest.mark.parametrize(
    ("dtype", "number", "one_by_one"),
    [("float32", 3.4e38, True), ("float32", 3.4e38, False), ("bfloat16", 3.3e38, True), ("float16", 65504.0, False)],
)
async def test_the_mean_of_large_tokens_is_answered(
    make_engine: MakeEngine, sqlite_url: str, dtype: str, number: float, one_by_one: bool
) -> None:
    """Two tokens of 3.4e38 in one chunk made their session unattendable for ever: their sum is infinity."""
    tokens = np.array([[number, 0], [number, 0], [-number, number]] * 2, np.float32)
    stored = torch.from_numpy(tokens).to(getattr(torch, dtype)).double().numpy()
    answers = []
    for restart in range(2):
        store = open_store(sqlite_url)
        engine = await make_engine(store)
        if not restart:
            await engine.create(named("s"), CreateRequest(dim=2, chunk_size=2, dtype=dtype))  # type: ignore[arg-type]
            for some in np.split(tokens, 6) if one_by_one else [tokens]:
                await engine.append(named("s"), AppendRequest(embeddings=some))
        for request in (ZERO, AttendRequest(queries=ZERO.queries, start=1, stop=6)):  # chunks seen whole, and in part
            result = await engine.attend(named("s"), request)
            start = request.start
            chunks = [stored[max(first, start) : first + 2].mean(axis=0) for first in (0, 2, 4)]
            np.testing.assert_allclose(result.output[0], np.mean(chunks, axis=0), rtol=1e-5, atol=1e-5 * number)
            answers.append(result)
        page = await engine.chunks(named("s"), keys=True)
        assert all(info.key is not None and np.isfinite(info.key).all() for info in page.chunks)
        assert [info.key_norm for info in page.chunks] == pytest.approx(
            [np.linalg.norm(stored[first : first + 2].mean(axis=0)) for first in (0, 2, 4)], rel=1e-5
        )
        await engine.compaction.finish()
        await engine.close()
        store.close()
    for then, now in zip(answers[:2], answers[2:], strict=True):  # before, and from the keys that were kept
        np.testing.assert_array_equal(now.output, then.output)


async def test_the_norm_of_a_large_key_is_a_number(engine: Engine) -> None:
    """Its squares were summed in float32."""
    await engine.create(named("s"), CreateRequest(dim=2))
    await engine.append(named("s"), AppendRequest(embeddings=np.array([[1e38, 1e38]], np.float32)))
    (info,) = (await engine.chunks(named("s"))).chunks
    assert info.key_norm == pytest.approx(2**0.5 * 1e38)


async def test_infinite_keys_of_an_older_version_are_computed_again(make_engine: MakeEngine) -> None:
    """Compaction had kept them."""
    store = MemoryStore()
    engine = await make_engine(store)
    await engine.create(named("s"), CreateRequest(dim=2, chunk_size=2))
    await engine.append(named("s"), AppendRequest(embeddings=np.full((6, 2), 3e38, np.float32)))
    row = store.get_session(named("s"))
    assert row is not None
    kept = np.array([[3e38, 3e38], [np.inf, np.inf], [np.inf, np.inf]], np.float32)
    store.write([Compact(row.sid, Summary(0, 3, kept.tobytes()), 2)], now=1.0)
    await go_cold(engine)
    np.testing.assert_allclose((await engine.attend(named("s"), ZERO)).output, [[3e38, 3e38]], rtol=1e-6)


async def test_who_overflows_is_told_alone(engine: Engine) -> None:
    """In one batch: the error names what met, the others are answered as ever."""
    tokens = vectors(1, 3 * SIZE, DIM)
    tokens[SIZE + 1] = 2e38
    await fill(engine, "large", tokens)
    await fill(engine, "s", vectors(2, 2 * SIZE, DIM))
    ordinary = AttendRequest(queries=vectors(3, 2, DIM))
    expected = await engine.attend(named("s"), ordinary)
    hides = AttendRequest(queries=ordinary.queries, chunk_mask=np.array([True, False, True]))
    huge = AttendRequest(queries=np.full((1, DIM), 3e38, np.float32))
    asked = [("s", ordinary), ("large", hides), ("s", huge), ("large", ordinary), ("large", huge)]
    results = await asyncio.gather(*(engine.attend(named(one), wish) for one, wish in asked), return_exceptions=True)
    answered = [result for result in results if not isinstance(result, BaseException)]
    assert len(answered) == 2 and engine.worker.queue.num_batches == 2
    np.testing.assert_allclose(answered[0].output, expected.output, rtol=1e-6)
    assert np.isfinite(answered[1].output).all()
    told = [str(error) for error in results if isinstance(error, InvalidArgument)]
    assert len(told) == 3 and "a query of up to 3e+38 meets the summary key of chunk" in told[0]
    assert "meets the summary key of chunk 1, of up to 4e+37; scale the embeddings, or hide such tokens" in told[1]


async def test_an_overflow_within_a_chunk_names_the_chunk(engine: Engine) -> None:
    """Its summary key is small."""
    await fill(engine, "s", np.array([[1e30] * DIM, [-1e30] * DIM], np.float32))
    query = np.zeros((1, DIM), np.float32)
    query[0, 0] = 1e20
    with pytest.raises(InvalidArgument, match=r"a query of up to 1e\+20 meets tokens of the chunks \[0\]"):
        await engine.attend(named("s"), AttendRequest(queries=query))


async def test_a_block_norms_large_queries(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Their variance overflowed float32, and the normed query was zero: a wrong answer, not an error."""
    config, weights = write_model(tmp_path / "block.safetensors", dim=DIM, heads=2, dim_head=11, block=True)
    engine = await make_engine(models_dir=tmp_path)
    tokens, queries = vectors(1, 17, DIM), vectors(2, 2, DIM)
    queries *= np.array([[1e20], [1e38]], np.float32) / np.abs(queries).max()
    await fill(engine, "s", tokens, model="block")
    expected = htm_reference(queries, tokens, config, weights, chunk_size=SIZE)
    assert (
        relative_error((await engine.attend(named("s"), AttendRequest(queries=queries))).output, expected.output)
        <= 1e-5
    )
