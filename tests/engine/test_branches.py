"""Forks and truncations on the device: pages are shared and counted once, nothing is loaded in vain."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.errors import (
    InvalidArgument,
    LengthConflict,
    QuotaExceeded,
    SessionConflict,
    SessionExpired,
    SessionNotFound,
)
from htm_service.records import AppendRequest, AttendRequest, Quota, SessionChange
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, on_device_thread, session_of
from tests.engine.test_attend import DIM, RETRIEVAL, SIZE, check, expect, fill, vectors
from tests.names import named

MODELS = {"retrieval": (RETRIEVAL, None)}
ASK = AttendRequest(queries=vectors(9, 2, DIM) / np.float32(3), top_k=3)
PAGE_BYTES = SIZE * DIM * 4


async def right(engine: Engine, name: str, tokens: Any) -> None:
    check(await engine.attend(named(name), ASK), expect(tokens, ASK, "attend", MODELS))


async def num_loads(engine: Engine) -> int:
    return int((await engine.info()).totals["loads"])


@pytest.mark.parametrize("length", [0, 3, 20, 34, 37])
async def test_a_fork_shares_the_pages_of_sealed_chunks(engine: Engine, length: int) -> None:
    """The second one costs its open chunk's page, and its keys; no page of the other is written to."""
    tokens = vectors(1, 60, DIM)
    await fill(engine, "s", tokens[:37])
    await right(engine, "s", tokens[:37])
    assert (await engine.fork(named("s"), named("f"), length)).length == length
    await on_device_thread(engine, lambda: None)
    shared = session_of(engine, "f").resident.held.pages[: length // SIZE] if length else []
    assert shared == session_of(engine, "s").resident.held.pages[: length // SIZE]
    await right(engine, "f", tokens[:length])
    await engine.append(named("f"), AppendRequest(embeddings=tokens[40:60]))
    await engine.append(named("s"), AppendRequest(embeddings=tokens[37:40]))
    await right(engine, "f", np.concatenate([tokens[:length], tokens[40:60]]))
    await right(engine, "s", tokens[:40])
    assert await num_loads(engine) == 0


async def test_pages_are_free_when_the_last_one_lets_go(engine: Engine) -> None:
    tokens = vectors(2, 42, DIM)
    await fill(engine, "s", tokens)
    for name in ("f", "g"):
        await engine.fork(named("s"), named(name))
    await engine.delete(named("s"))
    await go_cold(engine, "f")
    await right(engine, "g", tokens)
    await right(engine, "f", tokens)
    for name in ("f", "g"):
        await engine.delete(named(name))
    assert (await engine.info()).totals["device_bytes"] == 0


async def test_many_forks_fit_where_one_session_does(make_engine: MakeEngine) -> None:
    """The budget counts a page once: thirty branches of a session that fills half of it."""
    engine = await make_engine(memory_budget_bytes=200 * PAGE_BYTES)
    tokens = vectors(3, 100 * SIZE, DIM)
    await fill(engine, "s", tokens)
    await right(engine, "s", tokens)
    for number in range(3):
        await engine.fork(named("s"), named(f"f{number}"))
        await right(engine, f"f{number}", tokens)
    totals = (await engine.info()).totals
    assert totals["fetched_pages"] == totals["offloaded_sessions"] == totals["loads"] == 0


async def test_offloaded_pages_of_one_are_the_others_still(make_engine: MakeEngine) -> None:
    engine = await make_engine(memory_budget_bytes=40 * PAGE_BYTES)
    tokens = vectors(4, 20 * SIZE + 2, DIM)
    await fill(engine, "s", tokens)
    await engine.fork(named("s"), named("f"), 18 * SIZE + 1)
    for number in range(4):
        await fill(engine, f"other{number}", vectors(number, 15 * SIZE, DIM))
        await right(engine, "f", tokens[: 18 * SIZE + 1])
        await right(engine, "s", tokens)


async def test_a_fork_of_a_cold_session_begins_cold(engine: Engine) -> None:
    tokens = vectors(5, 33, DIM)
    await fill(engine, "s", tokens)
    await go_cold(engine)
    assert (await engine.fork(named("s"), named("f"), 22)).residency == "cold"
    await right(engine, "f", tokens[:22])
    assert session_of(engine, "s").resident.state == "cold"


async def held_up(engine: Engine) -> threading.Event:
    """The device thread does nothing until this is set."""
    begun, released = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        released.wait(30)

    engine.worker.queue.post(wait)
    await asyncio.to_thread(begun.wait, 30)
    return released


@pytest.mark.parametrize("length", [0, 12, 21])
async def test_what_a_fork_does_before_the_device_knows_it_is_not_lost(engine: Engine, length: int) -> None:
    tokens = vectors(7, 60, DIM)
    await fill(engine, "s", tokens[:33])
    released = await held_up(engine)
    await engine.fork(named("s"), named("f"), 22)
    await engine.truncate(named("f"), length)
    await engine.append(named("f"), AppendRequest(embeddings=tokens[40:50]))
    await engine.fork(named("f"), named("g"))
    released.set()
    for name in ("g", "f"):
        await right(engine, name, np.concatenate([tokens[:length], tokens[40:50]]))
    await right(engine, "s", tokens[:33])


@pytest.mark.parametrize("length", [None, 0, 12, 22])
async def test_nothing_is_shared_of_chunks_that_lack_something(engine: Engine, length: int | None) -> None:
    """The store's thread may see a session cold a moment before it is resident: what it writes then is not kept."""
    tokens = vectors(8, 60, DIM)
    await fill(engine, "s", tokens[:22])
    resident = session_of(engine, "s").resident
    resident.state = "cold"
    if length is not None:
        await engine.truncate(named("s"), length)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[40:47]))
    await on_device_thread(engine, lambda: None)
    resident.state = "resident"
    await engine.fork(named("s"), named("f"))
    await engine.append(named("s"), AppendRequest(embeddings=tokens[47:55]))
    kept = tokens[:22] if length is None else tokens[:length]
    await right(engine, "f", np.concatenate([kept, tokens[40:47]]))
    await right(engine, "s", np.concatenate([kept, tokens[40:55]]))


async def test_truncated_chunks_are_dropped_and_nothing_is_loaded(engine: Engine) -> None:
    """To 0 at the end of an episode, or to the middle of a chunk, whose key is computed again from its page."""
    tokens = vectors(6, 90, DIM)
    await fill(engine, "s", tokens[:44])
    await engine.fork(named("s"), named("f"))
    for length, stop in ((33, 44), (30, 51), (0, 23), (12, 17), (0, 0)):
        before = tokens[: (await engine.inspect(named("s"))).length]
        result = await engine.truncate(named("s"), length)
        assert result[:2] == (length, -(-length // SIZE))
        await right(engine, "s", before[:length])
        if stop:
            await engine.append(named("s"), AppendRequest(embeddings=tokens[length:stop]))
        await right(engine, "s", tokens[: max(length, stop)])
    await right(engine, "f", tokens[:44])
    assert await num_loads(engine) == 0


async def test_what_was_recalled_of_forgotten_tokens_is_forgotten(engine: Engine) -> None:
    tokens = vectors(7, 30, DIM)
    await fill(engine, "s", tokens)
    early = AttendRequest(queries=ASK.queries, top_k=9, stop=12)
    await engine.attend(named("s"), early)
    await engine.attend(named("s"), ASK)
    await engine.truncate(named("s"), 13)
    recalls = await engine.recalls(named("s"))
    assert [(recall.stop, recall.query is not None) for recall in recalls] == [(12, True)]
    heat = await engine.heat(named("s"))
    assert heat.num_chunks == 3 and heat.num_recalls[:2].min() > 0
    await engine.append(named("s"), AppendRequest(embeddings=tokens[13:30]))
    assert (await engine.heat(named("s"))).num_recalls[3:].max() == 0


async def test_masks_of_a_length_that_is_gone_are_refused(engine: Engine) -> None:
    await fill(engine, "s", vectors(8, 30, DIM))
    mask = np.ones(30, dtype=bool)
    attends = [engine.attend(named("s"), AttendRequest(queries=ASK.queries, mask=mask)) for _ in range(5)]
    answers = await asyncio.gather(engine.truncate(named("s"), 10), *attends, return_exceptions=True)
    for answer in answers[1:]:
        assert isinstance(answer, LengthConflict | InvalidArgument) or answer.length == 30  # type: ignore[union-attr]


async def test_refusals_change_nothing(engine: Engine) -> None:
    tokens = vectors(9, 12, DIM)
    await fill(engine, "s", tokens)
    await fill(engine, "taken", tokens[:1])
    with pytest.raises(SessionConflict, match="'taken' exists already"):
        await engine.fork(named("s"), named("taken"))
    with pytest.raises(InvalidArgument, match="length is 13, the length of session 's' is 12"):
        await engine.fork(named("s"), named("new"), 13)
    with pytest.raises(InvalidArgument, match="length is 13"):
        await engine.truncate(named("s"), 13)
    with pytest.raises(LengthConflict, match="if_length is 11, the session's length is 12"):
        await engine.truncate(named("s"), 3, if_length=11)
    for missing in (engine.fork(named("none"), named("new")), engine.truncate(named("none"), 0)):
        with pytest.raises(SessionNotFound):
            await missing
    await engine.set_quota(Quota("default", max_tokens=20))
    with pytest.raises(QuotaExceeded, match="25 tokens, its quota is 20"):
        await engine.fork(named("s"), named("new"))
    await right(engine, "s", tokens)


async def test_before_what_was_trimmed_only_all_can_go(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, 22, DIM), max_tokens=23, on_full="evict_oldest")
    await engine.append(named("s"), AppendRequest(embeddings=vectors(2, 9, DIM)))
    for refused in (engine.truncate(named("s"), 9), engine.fork(named("s"), named("f"), 9)):
        with pytest.raises(InvalidArgument, match="length is 9, the tokens of session 's' before 10 were trimmed"):
            await refused
    await engine.truncate(named("s"), 0)
    tokens = vectors(3, 7, DIM)
    await engine.append(named("s"), AppendRequest(embeddings=tokens))
    await right(engine, "s", tokens)
    assert (await engine.inspect(named("s"))).first_position == 0


async def test_a_child_outlives_its_expired_parent(make_engine: MakeEngine, sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    tokens = vectors(4, 40, DIM)
    await fill(engine, "s", tokens)
    await engine.fork(named("s"), named("f"), 31)
    await engine.update(named("s"), SessionChange(ttl_s=0.1))
    await asyncio.sleep(0.3)
    await engine.expiry.expire()
    with pytest.raises(SessionExpired):
        await engine.inspect(named("s"))
    await go_cold(engine, "f")
    await right(engine, "f", tokens[:31])
    assert list(store.verify()) == []
