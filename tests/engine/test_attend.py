"""Served attention against the float64 definition: models, masks, ranges, time travel, dtypes, recalled tokens."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htm_service.attention.model import RetrievalModel
from htm_service.attention.model_config import ModelConfig
from htm_service.engine import Engine
from htm_service.errors import InvalidArgument, ModelNotFound
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest
from tests.engine.conftest import MakeEngine
from tests.engine.models import Weights, write_model
from tests.names import named
from tests.reference import Reference, htm_reference, relative_error

DIM, SIZE = 13, 5
RETRIEVAL = RetrievalModel().config


def vectors(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


async def fill(engine: Engine, name: str, tokens: Any, **options: Any) -> None:
    await engine.create(named(name), CreateRequest(**{"dim": DIM, "chunk_size": SIZE, **options}))
    if len(tokens):
        await engine.append(named(name), AppendRequest(embeddings=tokens))


def check(result: AttendResult, expected: Reference, tolerance: float = 1e-5) -> None:
    if np.abs(expected.output).max() == 0:
        assert np.abs(result.output).max() == 0
    else:
        assert relative_error(result.output, expected.output) <= tolerance
    width = result.chunk_index.shape[1]
    np.testing.assert_array_equal(result.chunk_index, expected.chunk_index[:, :width])
    np.testing.assert_allclose(result.chunk_weight, expected.chunk_weight[:, :width], atol=tolerance)


@pytest.fixture
def models(tmp_path: Path) -> Mapping[str, tuple[ModelConfig, Weights | None]]:
    plain = write_model(tmp_path / "plain.safetensors", dim=DIM, heads=3, dim_head=7)
    block = write_model(tmp_path / "block.safetensors", dim=DIM, heads=2, dim_head=11, block=True, seed=1)
    bare = write_model(tmp_path / "bare.safetensors", dim=DIM, heads=3, dim_head=7, add_pos_enc=False, seed=2)
    return {"plain": plain, "block": block, "bare": bare, "retrieval": (RETRIEVAL, None)}


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_every_kind_of_request_equals_the_definition(
    data: st.DataObject, models: Mapping[str, tuple[ModelConfig, Weights | None]], tmp_path: Path
) -> None:
    """Random sessions, models, ranges, masks and chunk masks, many requests of one batch at a time."""

    from htm_service.config import EngineConfig
    from storage.resolve import open_store

    seed = data.draw(st.integers(0, 2**20))
    draw = np.random.default_rng(seed)

    async def run() -> None:
        engine = Engine(EngineConfig(device="cpu", models_dir=tmp_path), open_store("memory://"))
        await engine.start()
        tokens = {}
        for name in ("a", "b", "c"):
            tokens[name] = vectors(int(draw.integers(2**30)), int(draw.integers(0, 40)), DIM)
            await fill(engine, name, tokens[name], open_chunk=str(draw.choice(["attend", "exclude"])))
        requests, names = [], []
        for _ in range(8):
            name = str(draw.choice(["a", "b", "c"]))
            requests.append(random_request(draw, len(tokens[name])))
            names.append(name)
        results = await asyncio.gather(*(engine.attend(named(n), r) for n, r in zip(names, requests, strict=True)))
        infos = {name: await engine.inspect(named(name)) for name in tokens}
        await engine.close()
        for name, request, result in zip(names, requests, results, strict=True):
            check(result, expect(tokens[name], request, infos[name].open_chunk, models))

    asyncio.run(run())


def random_request(draw: np.random.Generator, length: int, size: int = SIZE) -> AttendRequest:
    num_queries = int(draw.integers(1, 4))
    stop = int(draw.integers(0, length + 1)) if draw.random() < 0.4 else None
    seen = length if stop is None else stop
    start = int(draw.integers(0, seen + 1)) if draw.random() < 0.3 else 0
    mask = draw.random(seen) < draw.choice([0.0, 0.3, 0.9]) if draw.random() < 0.4 else None
    num_chunks = -(-seen // size)
    shape = (num_queries, num_chunks) if draw.random() < 0.5 else (num_chunks,)
    chunk_mask = draw.random(shape) < 0.6 if draw.random() < 0.4 else None
    return AttendRequest(
        queries=vectors(int(draw.integers(2**30)), num_queries, DIM) / np.float32(3),
        model=str(draw.choice(["plain", "block", "bare", "retrieval"])),
        top_k=int(draw.integers(1, 10)) if draw.random() < 0.7 else None,
        start=start,
        stop=stop,
        mask=mask,
        chunk_mask=chunk_mask,
    )


def expect(
    tokens: Any,
    request: AttendRequest,
    open_chunk: str,
    models: Mapping[str, tuple[ModelConfig, Weights | None]],
    size: int = SIZE,
) -> Reference:
    config, weights = models[request.model or "retrieval"]
    seen = len(tokens) if request.stop is None else request.stop
    visible = np.arange(seen) >= request.start
    if request.mask is not None:
        visible &= request.mask
    if open_chunk == "exclude":
        visible[seen // size * size :] = False
    return htm_reference(
        request.queries,
        tokens[:seen],
        config,
        weights,
        top_k=request.top_k,
        chunk_size=size,
        visible=visible,
        chunk_mask=request.chunk_mask,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 1e-5)])
async def test_stored_dtypes(engine: Engine, dtype: str, tolerance: float) -> None:
    """What is stored is rounded to the dtype; what is computed from it is not."""
    tokens = vectors(1, 23, DIM)
    stored = torch.from_numpy(tokens).to(getattr(torch, dtype)).float().numpy()
    await fill(engine, "s", tokens, dtype=dtype)
    request = AttendRequest(queries=vectors(2, 3, DIM) / np.float32(5), top_k=3)
    check(await engine.attend(named("s"), request), expect(stored, request, "attend", {"retrieval": (RETRIEVAL, None)}))


async def test_recalled_tokens_are_ranked_and_their_weights_sum_to_one(engine: Engine) -> None:
    tokens = vectors(3, 23, DIM)
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
    payloads = [f'{{"i": {i}}}'.encode() if i % 2 else None for i in range(23)]
    await engine.append(named("s"), AppendRequest(embeddings=tokens, payloads=payloads))
    queries = vectors(4, 2, DIM) / np.float32(20)
    for rank_by in ("weight", "score"):
        request = AttendRequest(queries=queries, top_k=3, payloads=True, max_recalled=100, rank_by=rank_by)
        result = await engine.attend(named("s"), request)
        expected = htm_reference(queries, tokens, RETRIEVAL, top_k=3, chunk_size=SIZE)
        assert result.recalled is not None
        for row, weights, scores in zip(result.recalled, expected.token_weight, expected.token_score, strict=True):
            assert {token.position for token in row} == set(np.flatnonzero(weights > 0))
            assert sum(token.weight for token in row) == pytest.approx(1.0, abs=1e-5)
            for token in row:
                assert token.weight == pytest.approx(weights[token.position], abs=1e-6)
                assert token.score == pytest.approx(scores[token.position], abs=1e-4)
                assert token.chunk == token.position // SIZE
                assert token.payload == payloads[token.position]
            values = [getattr(token, rank_by) for token in row]
            assert values == sorted(values, reverse=True)
    few = await engine.attend(named("s"), AttendRequest(queries=queries, tokens=True, max_recalled=2))
    assert few.recalled is not None and [len(row) for row in few.recalled] == [2, 2]


async def test_chunks_of_one_token_are_searched_exactly(engine: Engine) -> None:
    """As docs/attention.md says of `retrieval`, in whatever order the tokens came."""
    tokens, queries, num = vectors(3, 300, DIM), vectors(4, 5, DIM) / np.float32(40), 20
    await fill(engine, "s", tokens, chunk_size=1)
    result = await engine.attend(named("s"), AttendRequest(queries=queries, top_k=num, payloads=True, max_recalled=num))
    assert result.recalled is not None
    for row, products in zip(result.recalled, queries @ tokens.T, strict=True):
        assert [token.position for token in row] == np.argsort(-products)[:num].tolist()


async def test_an_episode_is_seen_in_the_chunks_of_its_session(engine: Engine) -> None:
    """Not as if it were alone: whoever wants that gives it a session of its own (docs/attention.md)."""
    tokens, query = vectors(9, 18, DIM), vectors(10, 1, DIM) / np.float32(20)
    await fill(engine, "s", tokens[:0])
    for episode in (1, 2):
        part = tokens[9 * episode - 9 : 9 * episode]
        await engine.append(named("s"), AppendRequest(embeddings=part, episode=episode))
    await fill(engine, "alone", tokens[9:])
    chosen = await engine.attend(named("s"), AttendRequest(queries=query, episodes=[2]))
    alone = await engine.attend(named("alone"), AttendRequest(queries=query))
    expected = htm_reference(query, tokens[9:], RETRIEVAL, chunk_size=SIZE)
    check(alone, expected)
    assert relative_error(chosen.output, expected.output) > 1e-2
    assert sorted(chosen.chunk_index[0]) == [-1, 1, 2, 3]  # chunk 1 holds the end of the other episode, too


async def test_time_travel_gives_exactly_the_answer_of_then(engine: Engine) -> None:
    """Bit for bit, at every length: keys are accumulated in one order however the tokens arrived."""
    tokens = vectors(5, 17, DIM)
    await fill(engine, "s", tokens[:0])
    request = AttendRequest(queries=vectors(6, 2, DIM), top_k=2)
    then = []
    for token in tokens:
        await engine.append(named("s"), AppendRequest(embeddings=token))
        then.append(await engine.attend(named("s"), request))
    await fill(engine, "at-once", tokens)
    for name in ("s", "at-once"):
        for stop, answer in enumerate(then, start=1):
            travelled = AttendRequest(queries=request.queries, top_k=2, stop=stop)
            now = await engine.attend(named(name), travelled)
            np.testing.assert_array_equal(now.output, answer.output)
            np.testing.assert_array_equal(now.chunk_index, answer.chunk_index)
            assert now.length == 17


async def test_what_else_is_in_the_batch_does_not_widen_an_answer(engine: Engine) -> None:
    """K of a range was once that of the widest search of its batch, padded with -1."""
    await fill(engine, "s", vectors(8, 47, DIM))
    queries = vectors(9, 3, DIM)
    requests = [AttendRequest(queries=queries, stop=stop) for stop in (47, 4, 0, 47, 9)]
    results = await asyncio.gather(*(engine.attend(named("s"), request) for request in requests * 20))
    assert engine.worker.queue.num_batches < len(results)
    assert [result.chunk_index.shape[1] for result in results] == [8, 1, 0, 8, 2] * 20


async def test_ties_go_to_the_lower_chunk(engine: Engine) -> None:
    """A query of zeros has the same logit, exactly 0, for every chunk."""
    await fill(engine, "s", vectors(7, 6 * SIZE, DIM))
    result = await engine.attend(named("s"), AttendRequest(queries=np.zeros((2, DIM), np.float32), top_k=4))
    np.testing.assert_array_equal(result.chunk_index, [[0, 1, 2, 3]] * 2)


async def test_episodes(engine: Engine) -> None:
    tokens = vectors(9, 20, DIM)
    await fill(engine, "s", tokens[:0])
    for place, episode in enumerate([1, 1, 2, None, 1]):
        part = tokens[place * 4 : place * 4 + 4]
        await engine.append(named("s"), AppendRequest(embeddings=part, episode=episode))
    request = AttendRequest(queries=vectors(10, 1, DIM), top_k=9, episodes=[1])
    visible = np.repeat([True, True, False, False, True], 4)
    expected = htm_reference(request.queries, tokens, RETRIEVAL, top_k=9, chunk_size=SIZE, visible=visible)
    check(await engine.attend(named("s"), request), expected)


async def test_an_empty_session_answers_zero(engine: Engine) -> None:
    await fill(engine, "s", vectors(0, 0, DIM))
    result = await engine.attend(named("s"), AttendRequest(queries=vectors(1, 2, DIM), payloads=True))
    assert not result.output.any() and result.output.shape == (2, DIM)
    assert result.chunk_index.shape == (2, 0) and result.recalled == [[], []] and result.length == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": vectors(0, 3, 7)}, r"queries has shape \[3, 7\], it must be \[13\] or \[n, 13\]"),
        ({"queries": vectors(0, 0, DIM)}, r"queries has shape \[0, 13\]"),
        ({"queries": np.full((1, DIM), np.nan, np.float32)}, r"queries\[0, 0\] is nan"),
        ({"top_k": 0}, "top_k is 0, it must be 1 to 256"),
        ({"top_k": 257}, "top_k is 257"),
        ({"start": -1}, "start is -1"),
        ({"stop": 24}, "stop is 24, the session's length is 23"),
        ({"start": 9, "stop": 8}, "start is 9, it must be at most 8"),
        ({"mask": np.ones(22, bool)}, r"mask has shape \[22\], it must be \[23\]"),
        ({"chunk_mask": np.ones((2, 5), bool)}, r"chunk_mask has shape \[2, 5\], .* each of 3 queries"),
        ({"chunk_mask": np.ones((3, 4), bool)}, r"chunk_mask has shape \[3, 4\], it must be \[5\] or \[3, 5\]"),
        ({"max_recalled": 0}, "max_recalled is 0"),
        ({"rank_by": "age"}, "rank_by is 'age'"),
        ({"timeout_s": 0.0}, "timeout_ms is 0"),
        ({"queries": np.full((1, DIM), 3e38, np.float32)}, "overflows float32"),
    ],
)
async def test_bad_requests_name_value_and_limit(engine: Engine, fields: dict[str, Any], message: str) -> None:
    await fill(engine, "s", vectors(11, 23, DIM))
    with pytest.raises(InvalidArgument, match=message):
        await engine.attend(named("s"), AttendRequest(**{"queries": vectors(0, 3, DIM), **fields}))


async def test_an_unknown_model_names_those_that_are_there(engine: Engine) -> None:
    await fill(engine, "s", vectors(11, 3, DIM))
    with pytest.raises(ModelNotFound, match=r"nope.*retrieval"):
        await engine.attend(named("s"), AttendRequest(queries=vectors(0, 1, DIM), model="nope"))


async def test_a_model_of_another_width_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    write_model(tmp_path / "wide.safetensors", dim=17, heads=1, dim_head=3)
    engine = await make_engine(models_dir=tmp_path)
    await fill(engine, "s", vectors(11, 3, DIM))
    with pytest.raises(InvalidArgument, match="'wide' has width 17, the session has 13"):
        await engine.attend(named("s"), AttendRequest(queries=vectors(0, 1, DIM), model="wide"))
