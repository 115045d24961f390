"""Searches against a float64 scan: every kind of request, sessions larger than the device, models, restarts."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from htm_service.attention.model_config import ModelConfig
from htm_service.engine import Engine
from htm_service.errors import DeadlineExceeded, InvalidArgument, SessionNotFound
from htm_service.records import (
    AppendRequest,
    AttendRequest,
    CreateRequest,
    SearchAllResult,
    SearchRequest,
    SearchResult,
    SessionKey,
)
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, session_of
from tests.engine.models import Weights, write_model
from tests.engine.test_attend import vectors
from tests.names import named
from tests.reference import htm_reference

DIM, SIZE = 131, 7
"""As narrow as sketches are made for."""


async def fill(engine: Engine, name: str, tokens: Any, **options: Any) -> None:
    """A session with these tokens, each with its position as payload but every third."""
    await engine.create(named(name), CreateRequest(**{"dim": tokens.shape[1], "chunk_size": SIZE, **options}))
    payloads = [None if at % 3 == 2 else b'{"at":%d}' % at for at in range(len(tokens))]
    if len(tokens):
        await engine.append(named(name), AppendRequest(embeddings=tokens, payloads=payloads))


def visible_of(length: int, request: SearchRequest, open_chunk: str = "attend", episodes: Any = None) -> Any:
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


def check(result: SearchResult, tokens: Any, request: SearchRequest, visible: Any, *, least: float = 1.0) -> None:
    """The share `least` of the best, or as good as these, right scores in the right order, payloads, embeddings."""
    scores = np.atleast_2d(request.queries).astype(np.float64) @ tokens.astype(np.float64).T
    scores[:, ~visible] = -np.inf
    if request.min_score is not None:
        scores[scores < request.min_score] = -np.inf
    tolerance = 1e-5 * max(1.0, float(np.abs(scores[np.isfinite(scores)]).max(initial=0.0)))
    hits = wanted = 0
    for row, of in enumerate(scores):
        num = min(request.num_wanted, int((of > -np.inf).sum()))
        position = result.position[row]
        found = position[position >= 0]
        assert (position[len(found) :] == -1).all() and not result.score[row][len(found) :].any()
        assert len(found) == len(set(found.tolist())) and (np.diff(result.score[row][: len(found)]) <= 0).all()
        assert visible[found].all()
        np.testing.assert_allclose(result.score[row][: len(found)], of[found], atol=tolerance, rtol=1e-5)
        assert len(found) == num
        if num:
            worst = np.partition(of, -num)[-num]
            hits += int((of[found] >= worst - tolerance).sum())
            wanted += num
        if result.embeddings is not None:
            np.testing.assert_array_equal(result.embeddings[row][: len(found)], tokens[found])
            assert not result.embeddings[row][len(found) :].any()
        if result.payloads is not None:
            for at in found.tolist():
                assert result.payloads.get(at) == (None if at % 3 == 2 else b'{"at":%d}' % at)
    assert hits >= least * wanted, (hits, wanted)


def random_search(draw: np.random.Generator, length: int, **fields: Any) -> SearchRequest:
    stop = int(draw.integers(0, length + 1)) if draw.random() < 0.4 else None
    n = length if stop is None else stop
    return SearchRequest(
        draw.standard_normal((int(draw.integers(1, 4)), DIM)).astype(np.float32),
        **{
            "num_wanted": int(draw.integers(1, 12)),
            "start": int(draw.integers(0, n + 1)) if draw.random() < 0.3 else 0,
            "stop": stop,
            "mask": draw.random(n) < draw.choice([0.02, 0.5, 0.98]) if draw.random() < 0.4 else None,
            "exact": bool(draw.random() < 0.3),
            "min_score": float(draw.normal() * 10) if draw.random() < 0.3 else None,
            "embeddings": bool(draw.random() < 0.3),
            **fields,
        },
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("open_chunk", ["attend", "exclude"])
async def test_every_kind_of_search_many_at_once(engine: Engine, dtype: str, open_chunk: str) -> None:
    draw = np.random.default_rng(3)
    for name, length in (("one", 1), ("short", 5), ("long", 1_003), ("none", 0)):
        tokens = torch.from_numpy(vectors(length, length, DIM)).to(getattr(torch, dtype))
        stored = tokens.float().numpy()
        await fill(engine, name, stored, dtype=dtype, open_chunk=open_chunk)
        requests = [random_search(draw, length) for _ in range(30)]
        results = await asyncio.gather(*(engine.search(named(name), request) for request in requests))
        for request, result in zip(requests, results, strict=True):
            visible = visible_of(length, request, open_chunk)
            check(result, stored, request, visible, least=1.0 if request.exact else 0.8)
            assert result.length == length and result.chunk_size == SIZE


async def test_by_default_nearly_all_that_exact_search_finds_is_found(engine: Engine) -> None:
    tokens = vectors(1, 60, DIM).repeat(50, axis=0) + 0.5 * vectors(2, 3_000, DIM)
    for name, rows in (("in order", tokens), ("shuffled", tokens[np.random.default_rng(3).permutation(3_000)])):
        name = name.replace(" ", "-")
        await fill(engine, name, rows)
        queries = np.concatenate([tokens[:100] + 0.5 * vectors(4, 100, DIM), vectors(5, 100, DIM)])
        request = SearchRequest(queries, num_wanted=8)
        for _ in range(2):  # as sketches are made, and when they are there
            check(await engine.search(named(name), request), rows, request, np.ones(3_000, bool), least=0.98)
        sketches = session_of(engine, name).resident.held.sketches
        assert sketches is not None and sketches.num_known == 3_000 // SIZE


async def test_a_token_is_found_as_soon_as_it_is_acknowledged(engine: Engine) -> None:
    tokens = vectors(1, 500, DIM)
    await fill(engine, "s", tokens[:0])
    for at in range(500):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[at : at + 1]))
        if at % 11 == 0:
            result = await engine.search(named("s"), SearchRequest(tokens[at] * 3, num_wanted=1))
            assert result.position.tolist() == [[at]] and result.length == at + 1


async def test_sketches_cost_what_they_are_said_to(engine: Engine) -> None:
    """D/8 and 4 bytes for each token, counted as keys; nothing before the first search."""
    tokens = vectors(1, 700, 128)
    await fill(engine, "s", tokens)
    await engine.attend(named("s"), AttendRequest(queries=tokens[0]))
    before = (await engine.inspect(named("s"))).device_key_bytes
    await engine.search(named("s"), SearchRequest(tokens[0]))
    after = (await engine.inspect(named("s"))).device_key_bytes
    assert after - before == 700 * (128 // 8 + 4)
    assert (await engine.info()).totals["device_bytes"] >= after
    narrow = vectors(1, 700, 127)
    await fill(engine, "narrow", narrow)
    await engine.search(named("narrow"), SearchRequest(narrow[0]))
    assert session_of(engine, "narrow").resident.held.sketches is None


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
@pytest.mark.parametrize("size", ["larger than the device", "cold"])
async def test_what_is_not_on_the_device_is_found_too(
    make_engine: MakeEngine, sqlite_url: str, url: str, size: str
) -> None:
    tokens = vectors(1, 200 * SIZE + 3, DIM)
    page_bytes = SIZE * DIM * 4
    budget = 60 * page_bytes if size != "cold" else 1 << 30
    store = open_store(sqlite_url if url == "sqlite" else url)
    engine = await make_engine(store, memory_budget_bytes=budget)
    await fill(engine, "s", tokens)
    await engine.compaction.finish()
    draw = np.random.default_rng(7)
    for _ in range(3):
        if size == "cold":
            await go_cold(engine)
        requests = [random_search(draw, len(tokens), embeddings=False) for _ in range(6)]
        results = await asyncio.gather(*(engine.search(named("s"), request) for request in requests))
        for request, result in zip(requests, results, strict=True):
            check(result, tokens, request, visible_of(len(tokens), request), least=1.0 if request.exact else 0.8)
        assert int((await engine.info()).totals["device_bytes"]) <= budget
    request = SearchRequest(vectors(9, 1, DIM), num_wanted=3, embeddings=True)
    check(await engine.search(named("s"), request), tokens, request, np.ones(len(tokens), bool), least=0.6)


async def test_a_session_larger_than_the_device_is_searched_without_reading_it(make_engine: MakeEngine) -> None:
    """Once its sketches are made, only what is scored is fetched."""
    tokens = vectors(1, 400 * SIZE, DIM)
    engine = await make_engine(memory_budget_bytes=150 * SIZE * DIM * 4)
    await fill(engine, "s", tokens)
    await engine.compaction.finish()
    request = SearchRequest(tokens[5] + tokens[6], num_wanted=2)
    await engine.search(named("s"), request)
    before = (await engine.info()).totals["fetched_pages"]
    for _ in range(5):
        result = await engine.search(named("s"), request)
        assert sorted(result.position[0].tolist()) == [5, 6]
    fetched = (await engine.info()).totals["fetched_pages"] - before
    assert fetched < 5 * 40


async def test_models_score_with_their_heads_and_positions(make_engine: MakeEngine, tmp_path: Any) -> None:
    configs: dict[str, tuple[ModelConfig, Weights]] = {
        "attend": write_model(tmp_path / "attend.safetensors", dim=DIM, heads=3, dim_head=11),
        "block": write_model(tmp_path / "block.safetensors", dim=DIM, heads=2, dim_head=8, block=True, seed=1),
        "plain": write_model(tmp_path / "plain.safetensors", dim=DIM, heads=2, dim_head=8, add_pos_enc=False, seed=2),
    }
    engine = await make_engine(models_dir=tmp_path)
    tokens = vectors(1, 41 * 5 + 2, DIM)
    await fill(engine, "s", tokens, chunk_size=5)
    queries = vectors(2, 3, DIM)
    for name, (config, weights) in configs.items():
        reference = htm_reference(queries, tokens, config, weights, top_k=len(tokens), chunk_size=5)
        for exact in (True, False, False):
            request = SearchRequest(queries, num_wanted=6, model=name, exact=exact)
            result = await engine.search(named("s"), request)
            for row, scores in enumerate(reference.token_score):
                order = np.argsort(-scores, kind="stable")[:6]
                np.testing.assert_allclose(result.score[row], scores[result.position[row]], rtol=1e-3, atol=1e-4)
                hits = len(set(order.tolist()) & set(result.position[row].tolist()))
                assert hits == 6 if exact else hits >= 5


async def test_episodes_trims_and_payloads_of_trimmed_tokens(engine: Engine) -> None:
    tokens = vectors(1, 40 * SIZE, DIM)
    await engine.create(
        named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=10 * SIZE, on_full="evict_oldest")
    )
    episodes = np.arange(len(tokens)) // 50
    for episode in range(int(episodes.max()) + 1):
        rows = np.flatnonzero(episodes == episode)
        payloads = [None if at % 3 == 2 else b'{"at":%d}' % at for at in rows.tolist()]
        await engine.append(named("s"), AppendRequest(embeddings=tokens[rows], payloads=payloads, episode=int(episode)))
        request = SearchRequest(vectors(episode, 2, DIM), num_wanted=5, exact=episode % 2 == 0)
        result = await engine.search(named("s"), request)
        visible = np.zeros(len(tokens), bool)
        visible[(await engine.inspect(named("s"))).first_position : rows[-1] + 1] = True
        check(result, tokens, request, visible, least=0.8)
    request = SearchRequest(vectors(1, 2, DIM), num_wanted=100, episodes=[4, 5], exact=True)
    result = await engine.search(named("s"), request)
    visible &= np.isin(episodes, [4, 5])
    check(result, tokens, request, visible)


async def test_a_restart_forgets_nothing(make_engine: MakeEngine, sqlite_url: str) -> None:
    tokens = vectors(1, 900, DIM)
    request = SearchRequest(tokens[:20] + 0.3 * vectors(2, 20, DIM), num_wanted=3)
    for restart in range(2):
        store = open_store(sqlite_url)
        engine = await make_engine(store)
        if not restart:
            await fill(engine, "s", tokens)
        for _ in range(2):
            check(await engine.search(named("s"), request), tokens, request, np.ones(900, bool), least=0.95)
        await engine.close()
        store.close()


async def test_several_sessions_together(engine: Engine) -> None:
    parts = {name: vectors(seed, 200, DIM) for seed, name in enumerate(["a", "b", "c"])}
    for name, tokens in parts.items():
        await fill(engine, name, tokens, labels={"user": "ana" if name < "c" else "bob"})
    together = np.concatenate([parts["a"], parts["b"]])
    queries = vectors(9, 3, DIM)
    wanted = np.argsort(-(queries @ together.T), axis=1, kind="stable")[:, :7]

    def rows(result: SearchAllResult) -> list[list[int]]:
        found = [
            [(result.sessions[of], int(result.results[of].position[query, at])) for of, at in row]
            for query, row in enumerate(result.best)
        ]
        return [[at + 200 * "ab".index(name) for name, at in row] for row in found]

    request = SearchRequest(queries, num_wanted=7, exact=True)
    for result in (
        await engine.search_all("default", request, ["a", "b"]),
        await engine.search_all("default", request, labels={"user": "ana"}),
    ):
        assert rows(result) == wanted.tolist()
        for query, row in enumerate(result.best):
            for of, at in row:
                payloads = result.results[of].payloads
                position = int(result.results[of].position[query, at])
                assert payloads is not None
                assert payloads.get(position) == (None if position % 3 == 2 else b'{"at":%d}' % position)
    assert (await engine.search_all("default", request, labels={"user": "nobody"})).best == [[], [], []]
    with pytest.raises(SessionNotFound, match="nothing"):
        await engine.search_all("default", request, ["a", "nothing"])
    await engine.create(named("narrow"), CreateRequest(dim=3))
    with pytest.raises(InvalidArgument, match=r"'narrow'.*131"):
        await engine.search_all("default", request, ["a", "narrow"])
    assert (await engine.search_all("other", request, labels={"user": "ana"})).best == [[], [], []]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_wanted": 0}, "n is 0, it must be 1 to 1000"),
        ({"num_wanted": 1_001}, "n is 1001, it must be 1 to 1000"),
        ({"oversample": 101}, "oversample is 101, it must be 1 to 100"),
        ({"stop": 1_000}, "stop is 1000, the session's length is 30"),
        ({"start": -1}, "start is -1"),
        ({"min_score": float("nan")}, "min_score is nan"),
        ({"mask": np.ones(3, bool)}, r"mask has shape \[3\], it must be \[30\]"),
        ({"queries": vectors(1, 2, 5)}, r"queries has shape \[2, 5\]"),
        ({"queries": np.full((1, DIM), np.nan, np.float32)}, "queries.* is nan"),
        ({"timeout_s": 0.0}, "timeout_ms is 0"),
    ],
)
async def test_what_is_wrong_is_said(engine: Engine, fields: dict[str, Any], message: str) -> None:
    await fill(engine, "s", vectors(1, 30, DIM))
    with pytest.raises(InvalidArgument, match=message):
        await engine.search(named("s"), SearchRequest(**{"queries": vectors(2, 1, DIM), **fields}))


async def test_scores_that_overflow_are_refused_and_others_answered(engine: Engine) -> None:
    tokens = vectors(1, 100, DIM)
    tokens[40] = 3e38
    await fill(engine, "s", tokens)
    for exact in (True, False):
        large = engine.search(named("s"), SearchRequest(np.full((1, DIM), 9, np.float32), exact=exact, num_wanted=100))
        small = engine.search(named("s"), SearchRequest(vectors(2, 1, DIM), exact=exact, stop=40))
        with pytest.raises(InvalidArgument, match="overflow float32: a query of up to 9"):
            await large
        assert (await small).position.min() >= 0


async def test_numbers_at_the_end_of_float32_are_told_to_nobody_but_the_caller(engine: Engine) -> None:
    """NumPy warned of each in the server's log."""
    await fill(engine, "s", 1e-3 * vectors(1, 100, DIM))
    query = vectors(2, 1, DIM)
    for least, num in ((1e39, 0), (-1e39, 10)):
        found = await engine.search(named("s"), SearchRequest(query, min_score=least))
        assert (found.position >= 0).sum() == num
    large = SearchRequest(np.float32(3e38) * np.sign(query))
    found = await engine.search(named("s"), large)
    check(found, 1e-3 * vectors(1, 100, DIM), large, np.ones(100, bool))


async def test_an_answer_that_would_be_too_large_is_refused(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_answer_bytes=20_000)
    await engine.create(named("s"), CreateRequest(dim=DIM))
    payloads = [b'{"text":"%s"}' % (b"x" * 1_000) for _ in range(100)]
    await engine.append(named("s"), AppendRequest(embeddings=vectors(1, 100, DIM), payloads=payloads))
    queries = vectors(2, 1, DIM)
    assert len((await engine.search(named("s"), SearchRequest(queries))).payloads or {}) == 10
    with pytest.raises(InvalidArgument, match="20000"):
        await engine.search(named("s"), SearchRequest(queries, num_wanted=50))
    with pytest.raises(InvalidArgument, match="20000"):
        await engine.search(named("s"), SearchRequest(queries, num_wanted=50, payloads=False, embeddings=True))


async def test_places_where_nothing_is_found_count_too(make_engine: MakeEngine) -> None:
    """An answer has n places however short the session is: a token, 1,000 places and a few queries took gigabytes."""
    engine = await make_engine(max_answer_bytes=100_000)
    await fill(engine, "s", vectors(1, 2, DIM))
    few = SearchRequest(vectors(2, 2, DIM), num_wanted=10, embeddings=True)
    assert (await engine.search(named("s"), few)).position[:, 2:].max() == -1
    for many in (replace(few, num_wanted=1_000), SearchRequest(vectors(2, 9, DIM), num_wanted=1_000)):
        for search in (
            engine.search(named("s"), many),
            engine.batch_search([(named("s"), many)]),
            engine.search_all("default", many, ["s"]),
        ):
            with pytest.raises(InvalidArgument, match="the limit of one answer is 100000"):
                await search
    one = SearchRequest(vectors(2, 1, DIM), num_wanted=10, embeddings=True)
    with pytest.raises(InvalidArgument, match="the limit of one answer is 100000"):
        await engine.batch_search([(named(name), one) for name in ("s", *map(str, range(30)))])


async def test_a_search_is_no_recall_and_has_a_deadline(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_batch_products=1 << 20)
    tokens = vectors(1, 2_000, DIM)
    await fill(engine, "s", tokens)
    await engine.search(named("s"), SearchRequest(tokens[:30]))
    info = await engine.inspect(named("s"))
    assert info.num_attends == info.num_queries == 0 and await engine.recalls(named("s")) == []
    with pytest.raises(DeadlineExceeded):
        await engine.search(named("s"), SearchRequest(tokens, timeout_s=1e-4))
    with pytest.raises(SessionNotFound):
        await engine.search(SessionKey("default", "nobody"), SearchRequest(tokens[:1]))


@pytest.mark.parametrize("url", ["memory://", "sqlite", "postgresql"])
async def test_branches_truncations_and_searches_in_any_order(
    make_engine: MakeEngine, request: pytest.FixtureRequest, url: str
) -> None:
    """Positions are given again: neither sketches nor payloads of what was there before may be found."""
    draw = np.random.default_rng(11)
    engine = await make_engine(open_store(url if url == "memory://" else request.getfixturevalue(f"{url}_url")))
    held: dict[str, tuple[Any, list[bytes | None]]] = {"s0": (np.zeros((0, DIM), np.float32), [])}
    await engine.create(named("s0"), CreateRequest(dim=DIM, chunk_size=SIZE))
    for turn in range(120):
        name = str(draw.choice(list(held)))
        tokens, payloads = held[name]
        what = draw.choice(["append", "append", "truncate", "fork", "search", "search", "search", "cold", "keep"])
        if what == "append":
            new = draw.standard_normal((int(draw.integers(1, 60)), DIM)).astype(np.float32)
            texts = [None if draw.random() < 0.3 else b'{"turn":%d,"at":%d}' % (turn, at) for at in range(len(new))]
            await engine.append(named(name), AppendRequest(embeddings=new, payloads=texts))
            held[name] = np.concatenate([tokens, new]), [*payloads, *texts]
        elif what == "truncate":
            length = int(draw.choice([0, len(tokens), int(draw.integers(0, len(tokens) + 1))]))
            await engine.truncate(named(name), length)
            held[name] = tokens[:length], payloads[:length]
        elif what == "fork" and len(held) < 6:
            length = int(draw.integers(0, len(tokens) + 1))
            child = f"s{len(held)}"
            await engine.fork(named(name), named(child), length)
            held[child] = tokens[:length], payloads[:length]
        elif what == "cold":
            await go_cold(engine, name)
        elif what == "keep":
            await engine.compaction.finish()
        elif what == "search" and len(tokens):
            asked = SearchRequest(
                draw.standard_normal((2, DIM)).astype(np.float32), num_wanted=5, exact=bool(draw.random() < 0.5)
            )
            result = await engine.search(named(name), asked)
            check(result._replace(payloads=None), tokens, asked, np.ones(len(tokens), bool), least=0.6)
            for at in result.position[result.position >= 0].tolist():
                assert (result.payloads or {}).get(at) == payloads[at], (turn, name, at)
