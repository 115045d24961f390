"""Explanations: the choice is the attend's, for every model, mask and range; the ranking is by the definition."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htm_service.attention.model import RetrievalModel
from htm_service.attention.model_config import ModelConfig
from htm_service.config import MAX_NOTE_CHARS, MAX_RANKED, EngineConfig
from htm_service.engine import Engine
from htm_service.errors import InvalidArgument, SessionNotFound
from htm_service.records import AppendRequest, AttendRequest, AttendResult, CreateRequest, Explanation
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, session_of
from tests.engine.models import Weights
from tests.engine.test_attend import DIM, SIZE, expect, fill, models, random_request, vectors
from tests.names import named

assert callable(models), "a fixture"


@given(seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_it_explains_what_an_attend_takes(
    seed: int, models: Mapping[str, tuple[ModelConfig, Weights | None]], tmp_path: Path
) -> None:
    """Random sessions, some trimmed, models, ranges, masks, chunk masks and episodes, beside other requests."""
    draw = np.random.default_rng(seed)

    async def run() -> None:
        engine = Engine(EngineConfig(device="cpu", models_dir=tmp_path), open_store("memory://"))
        await engine.start()
        tokens = vectors(seed, int(draw.integers(0, 40)), DIM)
        await fill(engine, "s", tokens, open_chunk=str(draw.choice(["attend", "exclude"])))
        asked = [random_request(draw, len(tokens)) for _ in range(6)]
        requests = [
            replace(
                request,
                queries=request.queries[:1],
                chunk_mask=request.chunk_mask
                if request.chunk_mask is None or request.chunk_mask.ndim == 1
                else request.chunk_mask[:1],
                tokens=True,
            )
            for request in asked
        ]
        both = [(engine.explain(named("s"), one, MAX_RANKED), engine.attend(named("s"), one)) for one in requests]
        found = await asyncio.gather(*(asyncio.gather(*pair) for pair in both))
        info = await engine.inspect(named("s"))
        await engine.close()
        assert info.num_attends == len(requests), "an explanation is no recall"
        for request, (explained, attended) in zip(requests, found, strict=True):
            check(explained, attended)
            # The reference takes all chunks when it may: their order is that of the ranking, up to equal logits.
            everything = expect(tokens, replace(request, top_k=100), info.open_chunk, models)
            visible = everything.chunk_index[0][everything.chunk_index[0] >= 0]
            assert sorted(explained.ranking.index.tolist()) == sorted(visible.tolist())
            np.testing.assert_array_equal(explained.ranking.index, visible)

    asyncio.run(run())


def check(explained: Explanation, attended: AttendResult) -> None:
    """The same answer, and a ranking of which the first ones are those taken, with weights made of their logits."""
    ranking, taken = explained.ranking, attended.chunk_index[0][attended.chunk_index[0] >= 0]
    np.testing.assert_allclose(explained.attended.output, attended.output, atol=1e-6)  # another batch, another rounding
    tokens, expected = (
        sorted((one.chunk, one.position) for one in (found.recalled or [[]])[0])
        for found in (explained.attended, attended)
    )
    assert tokens == expected
    assert ranking.num_taken == len(taken) and ranking.num_visible == len(ranking.index)
    np.testing.assert_array_equal(ranking.index[: len(taken)], taken)
    np.testing.assert_allclose(ranking.weight[: len(taken)], attended.chunk_weight[0][: len(taken)], atol=1e-6)
    assert not ranking.weight[len(taken) :].any()
    assert (np.diff(ranking.logit[len(taken) :]) <= 0).all()
    if len(taken):
        shares = np.exp(ranking.logit[: len(taken)].astype(np.float64) - ranking.logit[0])
        np.testing.assert_allclose(ranking.weight[: len(taken)], shares / shares.sum(), atol=1e-5)
        assert (ranking.logit[len(taken) :] <= ranking.logit[len(taken) - 1] + 1e-4).all()


async def test_of_many_chunks_the_first_are_listed_and_all_are_counted(engine: Engine) -> None:
    await fill(engine, "s", vectors(0, 11 * SIZE, DIM))
    request = AttendRequest(queries=vectors(1, DIM), top_k=3)
    whole, short = await engine.explain(named("s"), request), await engine.explain(named("s"), request, 2)
    assert (whole.ranking.num_taken, whole.ranking.num_visible, whole.attended.top_k) == (3, 11, 3)
    assert (whole.model, whole.attended.model_hash) == ("retrieval", RetrievalModel().hash)
    assert (short.ranking.num_taken, short.ranking.num_visible) == (3, 11)
    np.testing.assert_array_equal(short.ranking.index, whole.ranking.index[:2])


async def test_only_the_chunks_it_takes_are_fetched(make_engine: MakeEngine) -> None:
    """A session far beyond the budget is ranked by its keys."""
    page = SIZE * DIM * 4
    engine = await make_engine(memory_budget_bytes=40 * page)
    await fill(engine, "s", np.empty((0, DIM), np.float32))
    for piece in np.split(vectors(2, 90 * SIZE, DIM), 9):
        await engine.append(named("s"), AppendRequest(piece))
    await go_cold(engine)
    found = await engine.explain(named("s"), AttendRequest(queries=vectors(3, DIM), top_k=3))
    assert found.ranking.num_visible == 90
    assert (await engine.info()).totals["fetched_pages"] <= 3


async def test_episodes_and_time_travel(engine: Engine) -> None:
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
    for episode in (1, 2):
        await engine.append(named("s"), AppendRequest(vectors(episode, 3 * SIZE, DIM), episode=episode))
    query = vectors(5, DIM)
    first = await engine.explain(named("s"), AttendRequest(queries=query, episodes=[1]))
    then = await engine.explain(named("s"), AttendRequest(queries=query, stop=3 * SIZE))
    assert sorted(first.ranking.index.tolist()) == sorted(then.ranking.index.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("limit", "rows"), [(0, 1), (MAX_RANKED + 1, 1), (5, 2)])
async def test_what_is_refused(engine: Engine, limit: int, rows: int) -> None:
    await fill(engine, "s", vectors(0, 3, DIM))
    with pytest.raises(InvalidArgument, match=r"limit is|number of queries is 2"):
        await engine.explain(named("s"), AttendRequest(queries=vectors(1, rows, DIM)), limit)
    with pytest.raises(SessionNotFound):
        await engine.explain(named("nobody"), AttendRequest(queries=vectors(1, DIM)))


async def test_a_recall_keeps_what_was_asked_and_can_be_explained_later(engine: Engine) -> None:
    """Also after the session grew, and after it left the device: accounts are the host's."""
    await fill(engine, "s", vectors(0, 7 * SIZE, DIM))
    queries = vectors(1, 2, DIM)
    asked = AttendRequest(queries=queries, top_k=2, note="where is the key?", tokens=True, episodes=None)
    attended = await engine.attend(named("s"), asked)
    await engine.append(named("s"), AppendRequest(vectors(9, 4 * SIZE, DIM)))
    await go_cold(engine)
    (recall,) = await engine.recalls(named("s"))
    assert recall.note == "where is the key?" and not recall.is_masked
    assert recall.query is not None
    again = AttendRequest(queries=recall.query, model=recall.model, top_k=recall.top_k, stop=recall.stop)
    explained = await engine.explain(named("s"), again)
    np.testing.assert_array_equal(explained.ranking.index[:2], attended.chunk_index[0])
    assert (await engine.chunk(named("s"), int(attended.chunk_index[0, 0]))).chunk.num_recalls > 0


async def test_a_note_has_a_limit(engine: Engine) -> None:
    await fill(engine, "s", vectors(0, 3, DIM))
    await engine.attend(named("s"), AttendRequest(queries=vectors(1, DIM), note="n" * MAX_NOTE_CHARS))
    with pytest.raises(InvalidArgument, match=f"note has {MAX_NOTE_CHARS + 1} characters, the limit is"):
        await engine.attend(named("s"), AttendRequest(queries=vectors(1, DIM), note="n" * (MAX_NOTE_CHARS + 1)))
    assert len(await engine.recalls(named("s"))) == 1


async def test_accounts_can_be_switched_off(make_engine: MakeEngine) -> None:
    engine = await make_engine(recalls_per_session=0)
    await fill(engine, "s", vectors(0, 3 * SIZE, DIM))
    for _ in range(3):
        await engine.attend(named("s"), AttendRequest(queries=vectors(1, DIM), note="?"))
    assert await engine.recalls(named("s")) == []
    assert (await engine.chunk(named("s"), 0)).chunk.num_recalls == 0
    assert (await engine.heat(named("s"))).mass.sum() == 0 and (await engine.inspect(named("s"))).num_attends == 3


async def test_heat_sums_up_what_the_chunks_say(engine: Engine) -> None:
    await fill(engine, "s", vectors(0, 13 * SIZE + 2, DIM))
    for seed in range(9):
        await engine.attend(named("s"), AttendRequest(queries=vectors(seed, 2, DIM), top_k=3))
    chunks = (await engine.chunks(named("s"))).chunks
    for first, last, bins in ((0, None, 600), (0, None, 4), (2, 11, 3), (5, 5, 3)):
        heat = await engine.heat(named("s"), first, last, bins)
        some = chunks[first : 14 if last is None else last]
        each = heat.num_chunks_each
        assert len(heat.mass) <= bins and heat.num_chunks == len(some)
        for place, run in enumerate(some[at : at + each] for at in range(0, len(some), each)):
            assert heat.num_recalls[place] == sum(chunk.num_recalls for chunk in run)
            assert heat.mass[place] == pytest.approx(sum(chunk.mass for chunk in run))
            assert heat.num_resident[place] == sum(chunk.tier == "resident" for chunk in run)
    session = await go_cold(engine)
    assert not (await engine.heat(named("s"))).num_resident.any()
    assert session.resident.state == "cold", "to look at it does not load it"
    for wrong in ({"bins": 0}, {"first": 3, "last": 2}, {"last": 15}):
        with pytest.raises(InvalidArgument):
            await engine.heat(named("s"), **wrong)


async def test_heat_of_a_session_that_was_trimmed(engine: Engine) -> None:
    settings = CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=4 * SIZE, on_full="evict_oldest")
    await engine.create(named("s"), settings)
    for seed in range(9):
        await engine.append(named("s"), AppendRequest(vectors(seed, SIZE, DIM)))
        await engine.attend(named("s"), AttendRequest(queries=vectors(seed, DIM), top_k=2))
    assert session_of(engine, "s").first_chunk == 5
    heat = await engine.heat(named("s"))
    assert heat.num_chunks == 9 and heat.mass[5:].sum() > 0 and heat.num_resident.tolist() == [0] * 5 + [1] * 4


async def test_accounts_of_sessions_used_longest_ago_are_forgotten(make_engine: MakeEngine) -> None:
    """They stayed for as long as the server ran, of however many sessions."""
    engine = await make_engine(max_recall_bytes=40_000)
    for number in range(6):
        await fill(engine, f"s{number}", vectors(number, 5, DIM))
    for number in range(6):
        for _ in range(10):
            await engine.attend(named(f"s{number}"), AttendRequest(queries=vectors(1, 1, DIM)))
    deadline = time.monotonic() + 5
    while session_of(engine, "s0").recalls.num_bytes:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    kept = [session_of(engine, f"s{number}").recalls for number in range(6)]
    assert sum(log.num_bytes for log in kept) <= 40_000 and len(kept[-1].latest(20)) == 10
    assert kept[0].of_chunk(0)[0] == 10, "what was taken stays counted"
