"""Sessions through the engine: life, appends, restart, offloading, expiry, isolation, batching, inspection."""

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from htm_service.attention.model import RetrievalModel
from htm_service.config import EngineConfig
from htm_service.cursors import encode_cursor
from htm_service.engine import Engine
from htm_service.errors import (
    ChunkNotFound,
    DeadlineExceeded,
    DiskFull,
    Draining,
    HTMError,
    IdempotencyMismatch,
    InvalidArgument,
    LengthConflict,
    OutOfMemory,
    SessionConflict,
    SessionExpired,
    SessionNotFound,
    Unhealthy,
)
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, SessionChange
from storage.base import DEFAULT_NAMESPACE, SessionKey, StoreFull
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import session_of
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.names import named
from tests.reference import htm_reference, relative_error

RETRIEVAL = RetrievalModel().config
QUERY = AttendRequest(queries=vectors(99, 2, DIM) / np.float32(9), top_k=3)


def right(tokens: Any, result: Any) -> bool:
    expected = htm_reference(QUERY.queries, tokens, RETRIEVAL, top_k=3, chunk_size=SIZE)
    return relative_error(result.output, expected.output) <= 1e-5


async def test_create_confirm_conflict(engine: Engine) -> None:
    settings = CreateRequest(dim=DIM, chunk_size=SIZE, labels={"team": "a"}, max_tokens=100)
    info, is_new = await engine.create(named("s"), settings)
    assert is_new and (info.dim, info.chunk_size, info.model, info.dtype) == (DIM, SIZE, "retrieval", "float32")
    again, is_new = await engine.create(named("s"), settings)
    assert not is_new and again.created_at == info.created_at
    for other in ({"dim": 7}, {"chunk_size": 7}, {"labels": {"team": "b"}}, {"max_tokens": None}, {"dtype": "float16"}):
        wish = CreateRequest(**{"dim": DIM, "chunk_size": SIZE, "max_tokens": 100, **other})  # type: ignore[arg-type]
        with pytest.raises(SessionConflict, match=next(iter(other))):
            await engine.create(named("s"), wish)
    made, is_new = await engine.create(SessionKey.new(DEFAULT_NAMESPACE), CreateRequest(dim=3))
    assert is_new and len(made.id) == 32 and made.chunk_size == 32


async def test_many_creates_at_once_make_one_session(engine: Engine) -> None:
    answers = await asyncio.gather(*(engine.create(named("s"), CreateRequest(dim=DIM)) for _ in range(20)))
    assert sum(is_new for _, is_new in answers) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "dim is missing"),
        ({"dim": 0}, "dim is 0, it must be 1 to 65536"),
        ({"dim": 3, "chunk_size": 0}, "chunk_size is 0"),
        ({"dim": 3, "dtype": "int8"}, "dtype is 'int8'"),
        ({"dim": 3, "ttl_s": -1}, "ttl_s is -1"),
        ({"dim": 3, "ttl_s": float("inf")}, "ttl_s is inf"),
        ({"dim": 3, "max_tokens": 0}, "max_tokens is 0"),
        ({"dim": 3, "on_full": "evict_oldest"}, "on_full is 'evict_oldest'"),
        ({"dim": 3, "labels": {"": "x"}}, "label ''"),
        ({"dim": 3, "labels": {str(i): "x" for i in range(65)}}, "65 labels, the limit is 64"),
    ],
)
async def test_bad_settings(engine: Engine, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        await engine.create(named("s"), CreateRequest(**settings))
    with pytest.raises(SessionNotFound):
        await engine.inspect(named("s"))


@pytest.mark.parametrize("name", ["", "a b", "a/b", ".", "..", "ä", "x" * 129, "a\n"])
async def test_bad_ids(engine: Engine, name: str) -> None:
    with pytest.raises(InvalidArgument, match="session id"):
        await engine.inspect(named(name))


async def test_appends_keep_their_order_and_conditions(engine: Engine) -> None:
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=30))
    tokens = vectors(1, 23, DIM)
    first = await engine.append(named("s"), AppendRequest(embeddings=tokens[:7], if_length=0))
    assert (first.start, first.length, first.num_chunks) == (0, 7, 2)
    with pytest.raises(LengthConflict, match="if_length is 0, the session's length is 7") as caught:
        await engine.append(named("s"), AppendRequest(embeddings=tokens[7:], if_length=0))
    assert caught.value.extra == {"length": 7}
    request = AppendRequest(embeddings=tokens[7:], idempotency_key="k")
    second = await engine.append(named("s"), request)
    again = await engine.append(named("s"), request)
    assert (again.start, again.length) == (second.start, second.length) == (7, 23)
    with pytest.raises(IdempotencyMismatch):
        await engine.append(named("s"), AppendRequest(embeddings=tokens[8:], idempotency_key="k"))
    with pytest.raises(InvalidArgument, match="longer than its max_tokens 30"):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(2, 8, DIM)))
    assert right(tokens, await engine.attend(named("s"), QUERY))
    info = await engine.inspect(named("s"))
    assert (info.length, info.num_chunks, info.num_sealed_chunks) == (23, 5, 4)
    assert (info.num_appends, info.num_attends, info.stored_bytes) == (2, 1, 23 * DIM * 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embeddings": vectors(0, 2, 7)}, r"embeddings has shape \[2, 7\]"),
        ({"embeddings": vectors(0, 0, DIM)}, "at least one row"),
        ({"embeddings": vectors(0, 2, 2, DIM)}, r"shape \[2, 2, 13\]"),
        ({"embeddings": np.array([[1.0] * 12 + [np.inf]], np.float32)}, r"embeddings\[0, 12\] is inf"),
        ({"embeddings": np.array([[-np.inf] + [1e30] * 12], np.float32)}, r"embeddings\[0, 0\] is -inf"),
        ({"embeddings": np.array([[1.0] * 13, [1.0] * 6 + [np.nan] * 7], np.float32)}, r"embeddings\[1, 6\] is nan"),
        ({"embeddings": np.array([[1.0] * 13] * 700 + [[np.nan] * 13], np.float32)}, r"embeddings\[700, 0\] is nan"),
        ({"payloads": [b"{}"]}, "payloads has 1 entries, embeddings has 2 tokens"),
        ({"if_length": -1}, "if_length is -1"),
    ],
)
async def test_bad_appends_change_nothing(engine: Engine, fields: dict[str, Any], message: str) -> None:
    tokens = vectors(1, 7, DIM)
    await fill(engine, "s", tokens)
    with pytest.raises(InvalidArgument, match=message):
        await engine.append(named("s"), AppendRequest(**{"embeddings": vectors(0, 2, DIM), **fields}))
    with pytest.raises(InvalidArgument, match=message):
        await engine.step(named("s"), QUERY, AppendRequest(**{"embeddings": vectors(0, 2, DIM), **fields}))
    assert (await engine.inspect(named("s"))).length == 7
    assert right(tokens, await engine.attend(named("s"), QUERY))


@pytest.mark.parametrize("num_tokens", [2, 701])
@pytest.mark.parametrize("value", [1e30, -1e30, 1e-45])
async def test_any_finite_number_is_taken(engine: Engine, value: float, num_tokens: int) -> None:
    """Also those whose squares are not finite in float32."""
    tokens = np.full((num_tokens, DIM), value, np.float32)
    await fill(engine, "s", tokens)
    kept = await engine.read(named("s"), 0, num_tokens, embeddings=True, payloads=False)
    np.testing.assert_array_equal(kept.embeddings, tokens)


async def test_a_chunk_whose_sum_overflows_is_kept_and_told(engine: Engine) -> None:
    """numpy warned of it, and a warning that is an error ended the device's thread."""
    tokens = np.full((SIZE, DIM), 3e38, np.float32)
    for token in tokens:
        await fill(engine, "s", token[None])
    with pytest.raises(InvalidArgument):
        await engine.attend(named("s"), QUERY)
    kept = await engine.read(named("s"), 0, SIZE, embeddings=True, payloads=False)
    np.testing.assert_array_equal(kept.embeddings, tokens)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 7e4, "70000, the largest float16 is 65504"),
        ("bfloat16", 3.4e38, r"3.4e\+38, the largest bfloat16 is 3.38953e\+38"),
    ],
)
async def test_a_value_too_large_for_the_dtype_is_refused(
    engine: Engine, dtype: str, value: float, message: str
) -> None:
    """In bfloat16 it was once stored as infinity, and no attend could be answered after that."""
    await fill(engine, "s", vectors(0, 0, DIM), dtype=dtype)
    with pytest.raises(InvalidArgument, match=message):
        await engine.append(named("s"), AppendRequest(embeddings=np.full((1, DIM), value, np.float32)))


async def test_step_sees_the_session_before_its_own_append(engine: Engine) -> None:
    tokens = vectors(1, 12, DIM)
    await fill(engine, "s", tokens[:0])
    for place, token in enumerate(tokens):
        attended, appended = await engine.step(named("s"), QUERY, AppendRequest(embeddings=token))
        assert attended.length == place and appended.length == place + 1
        assert right(tokens[:place], attended) if place else not attended.output.any()


async def test_a_repeated_step_answers_what_the_first_one_did(engine: Engine) -> None:
    """It once attended to its own append: only the append was looked up by its key."""
    tokens = vectors(1, 12, DIM)
    await fill(engine, "s", tokens[:7])
    append = AppendRequest(embeddings=tokens[7:9], idempotency_key="k")
    first = await engine.step(named("s"), QUERY, append)
    await engine.append(named("s"), AppendRequest(embeddings=tokens[9:]))
    again = await engine.step(named("s"), QUERY, append)
    np.testing.assert_array_equal(again[0].output, first[0].output)
    assert again[0].length == first[0].length == 7
    assert (again[1].start, again[1].length) == (first[1].start, first[1].length) == (7, 9)
    assert (await engine.inspect(named("s"))).length == 12


@pytest.mark.parametrize("fields", [{"mask": np.arange(SIZE) > 1}, {"chunk_mask": np.ones((2, 1), np.bool_)}])
async def test_a_repeated_step_has_masks_of_the_first_ones_length(engine: Engine, fields: dict[str, Any]) -> None:
    """They were once refused, because by then the session had grown by the step itself."""
    tokens = vectors(1, 12, DIM)
    await fill(engine, "s", tokens[:SIZE])
    query, append = replace(QUERY, **fields), AppendRequest(embeddings=tokens[SIZE:7], idempotency_key="k")
    first = await engine.step(named("s"), query, append)
    again = await engine.step(named("s"), query, append)
    np.testing.assert_array_equal(again[0].output, first[0].output)
    assert again[0].length == first[0].length == SIZE
    assert (again[1].start, again[1].length) == (first[1].start, first[1].length) == (SIZE, 7)
    with pytest.raises(IdempotencyMismatch):
        await engine.step(named("s"), query, append._replace(episode=3))
    for key in (None, "another"):
        with pytest.raises(InvalidArgument, match="mask has shape"):
            await engine.step(named("s"), query, append._replace(idempotency_key=key))
    assert (await engine.inspect(named("s"))).length == 7


async def test_everything_acknowledged_is_there_after_a_restart(make_engine: MakeEngine, sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    engine = await make_engine(store)
    tokens = {f"s{i}": vectors(i, 3 + 7 * i, DIM) for i in range(8)}
    for name, rows in tokens.items():
        await fill(engine, name, rows[:0], dtype="bfloat16" if name == "s3" else "float32")

    async def stream(name: str) -> None:
        for row in tokens[name]:
            await engine.append(named(name), AppendRequest(embeddings=row, payloads=[b'{"of": "%s"}' % name.encode()]))

    await asyncio.gather(*map(stream, tokens))
    before = {name: await engine.attend(named(name), QUERY) for name in tokens}
    await engine.update(named("s2"), SessionChange(labels={"kept": "yes"}))
    await engine.close()
    store.close()

    reopened = await make_engine(open_store(sqlite_url))
    for name, rows in tokens.items():
        info = await reopened.inspect(named(name))
        assert info.length == len(rows)
        after = await reopened.attend(named(name), QUERY)
        np.testing.assert_array_equal(after.output, before[name].output)
        memories = await reopened.read(named(name), 0, None, embeddings=True, payloads=True)
        assert memories.payloads == [b'{"of": "%s"}' % name.encode()] * len(rows)
        if name != "s3":
            np.testing.assert_array_equal(memories.embeddings, rows)
    assert (await reopened.inspect(named("s2"))).labels == {"kept": "yes"}
    assert (await reopened.inspect(named("s1"))).residency == "resident"


async def test_a_budget_of_a_few_pages_answers_exactly(make_engine: MakeEngine) -> None:
    """Sessions together ten times larger than the budget: they take turns, and appends go on meanwhile."""
    engine = await make_engine(memory_budget_bytes=16_000)
    tokens = {f"s{i}": vectors(i, 61, DIM) for i in range(12)}
    await asyncio.gather(*(fill(engine, name, rows[:30]) for name, rows in tokens.items()))

    async def until_full(name: str) -> None:
        for stop in range(30, 60):
            result = await engine.attend(named(name), QUERY)
            assert result.length == stop and right(tokens[name][:stop], result)
            await engine.append(
                named(name), AppendRequest(embeddings=vectors(7, 1, DIM) if stop == 60 else tokens[name][stop])
            )

    await asyncio.gather(*map(until_full, tokens))
    totals = (await engine.info()).totals
    assert totals["offloaded_sessions"] > 0 and totals["offloaded_pages"] > 0 and totals["fetched_pages"] > 0
    assert totals["device_bytes"] <= 16_000


async def test_a_session_whose_keys_do_not_fit_is_out_of_memory_and_keeps_its_tokens(make_engine: MakeEngine) -> None:
    engine = await make_engine(memory_budget_bytes=1_500)
    tokens = vectors(1, 200, DIM)
    await fill(engine, "s", tokens)
    with pytest.raises(OutOfMemory, match=r"needs .* more on the device, .* of 1500 bytes are in use"):
        await engine.attend(named("s"), QUERY)
    memories = await engine.read(named("s"), 0, None, embeddings=True, payloads=False)
    np.testing.assert_array_equal(memories.embeddings, tokens)
    await fill(engine, "small", tokens[:3])
    assert right(tokens[:3], await engine.attend(named("small"), QUERY))


async def test_concurrent_requests_are_batched_and_answered_as_one_by_one(engine: Engine) -> None:
    tokens = {f"s{i}": vectors(i, 5 + i, DIM) for i in range(16)}
    for name, rows in tokens.items():
        await fill(engine, name, rows)
    alone = {name: await engine.attend(named(name), QUERY) for name in tokens}
    together = await asyncio.gather(*(engine.attend(named(name), QUERY) for name in tokens for _ in range(4)))
    assert max(result.timing.batch_size for result in together) > 1
    for name, result in zip((name for name in tokens for _ in range(4)), together, strict=True):
        assert right(tokens[name], result)
        np.testing.assert_allclose(result.output, alone[name].output, rtol=1e-5, atol=1e-6)


async def test_one_bad_request_in_a_batch_fails_alone(engine: Engine) -> None:
    tokens = vectors(1, 23, DIM)
    await fill(engine, "s", tokens)
    bad = AttendRequest(queries=QUERY.queries, stop=24)
    requests = [engine.attend(named("s"), bad if i == 7 else QUERY) for i in range(16)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [isinstance(result, InvalidArgument) for result in results] == [i == 7 for i in range(16)]
    assert all(right(tokens, result) for i, result in enumerate(results) if i != 7)


async def test_delete_leaves_nothing_behind(engine: Engine) -> None:
    tokens = vectors(1, 23, DIM)
    await fill(engine, "s", tokens)
    await engine.attend(named("s"), QUERY)
    await engine.delete(named("s"))
    for call in (
        engine.inspect(named("s")),
        engine.attend(named("s"), QUERY),
        engine.recalls(named("s")),
        engine.delete(named("s")),
    ):
        with pytest.raises(SessionNotFound):
            await call
    info = await engine.info()
    assert (info.totals["sessions"], info.totals["device_bytes"], info.totals["resident_sessions"]) == (0, 0, 0)
    await fill(engine, "s", tokens[:4])
    assert right(tokens[:4], await engine.attend(named("s"), QUERY))


async def test_deletes_race_with_everything_else(engine: Engine) -> None:
    """Whoever loses the race gets a clear error; nobody sees another session's tokens."""

    async def churn(seed: int) -> None:
        tokens = vectors(seed, 9, DIM)
        for _ in range(5):
            await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
            for call in (engine.append(named("s"), AppendRequest(embeddings=tokens)), engine.attend(named("s"), QUERY)):
                with contextlib.suppress(SessionNotFound):
                    await call
            with contextlib.suppress(SessionNotFound):
                await engine.delete(named("s"))

    await asyncio.gather(*(churn(seed) for seed in range(10)))
    assert engine.unhealthy_reason() is None
    assert (await engine.list_sessions(DEFAULT_NAMESPACE)).sessions == []
    assert (await engine.info()).totals["device_bytes"] == 0


async def test_idle_sessions_expire_and_are_swept() -> None:
    now = [1000.0]
    store = MemoryStore()
    engine = Engine(EngineConfig(device="cpu", expiry_interval_s=0.01), store, clock=lambda: now[0])
    await engine.start()
    await engine.create(named("s"), CreateRequest(dim=DIM, ttl_s=60))
    await engine.create(named("kept"), CreateRequest(dim=DIM))
    now[0] += 59
    await engine.append(named("s"), AppendRequest(embeddings=vectors(1, 3, DIM)))
    now[0] += 59
    assert (await engine.inspect(named("s"))).length == 3
    now[0] += 61
    with pytest.raises(SessionExpired, match="idle for longer"):
        await engine.attend(named("s"), QUERY)
    assert store.get_session(named("s")) is None
    _, is_new = await engine.create(named("s"), CreateRequest(dim=DIM, ttl_s=5))
    assert is_new
    now[0] += 6
    for _ in range(500):
        await asyncio.sleep(0.01)
        if store.get_session(named("s")) is None:
            break
    assert [row.id for row in store.list_sessions()] == ["kept"]
    with pytest.raises(SessionExpired):
        await engine.inspect(named("s"))
    await engine.close()


async def test_update(engine: Engine) -> None:
    await engine.create(named("s"), CreateRequest(dim=DIM, ttl_s=60))
    info = await engine.update(named("s"), SessionChange(labels={"a": "b"}))
    assert (info.labels, info.ttl_s) == ({"a": "b"}, 60)
    assert (await engine.update(named("s"), SessionChange(clear_ttl=True))).ttl_s is None
    with pytest.raises(InvalidArgument, match="ttl_s is 0"):
        await engine.update(named("s"), SessionChange(ttl_s=0))
    with pytest.raises(HTMError, match="nope"):
        await engine.update(named("s"), SessionChange(model="nope"))
    assert (await engine.update(named("s"), SessionChange(model="retrieval"))).labels == {"a": "b"}


async def test_listing_pages_by_id(engine: Engine) -> None:
    for i in range(5):
        await engine.create(named(f"a{i}"), CreateRequest(dim=3, labels={"odd": str(i % 2)}))
    await engine.create(named("b"), CreateRequest(dim=3))
    first = await engine.list_sessions(DEFAULT_NAMESPACE, prefix="a", limit=3)
    assert [info.id for info in first.sessions] == ["a0", "a1", "a2"]
    second = await engine.list_sessions(DEFAULT_NAMESPACE, prefix="a", limit=3, cursor=first.cursor)
    assert [info.id for info in second.sessions] == ["a3", "a4"] and second.cursor is None
    odd = await engine.list_sessions(DEFAULT_NAMESPACE, labels={"odd": "1"})
    assert [info.id for info in odd.sessions] == ["a1", "a3"]
    for cursor in ("!", "é", "_w"):  # not base64, not even ASCII (which was answered 500), not UTF-8
        with pytest.raises(InvalidArgument, match=f"cursor is '{cursor}'"):
            await engine.list_sessions(DEFAULT_NAMESPACE, cursor=cursor)


async def test_listings_refuse_what_no_session_or_chunk_is_called(engine: Engine) -> None:
    """Digits without end were answered 500, many labels and, on PostgreSQL, a NUL as if the store had failed."""
    await fill(engine, "s", vectors(1, 9, DIM))
    for key in ("9" * 5_000, "-1", "1.5", "x"):
        with pytest.raises(InvalidArgument, match="which no listing gave out"):
            await engine.chunks(named("s"), cursor=encode_cursor(key))
    assert not (await engine.chunks(named("s"), cursor=encode_cursor("9" * 15))).chunks
    with pytest.raises(InvalidArgument, match="which no listing gave out"):
        await engine.list_sessions(DEFAULT_NAMESPACE, cursor=encode_cursor("a\0"))
    with pytest.raises(InvalidArgument, match=r"prefix is 'a\\x00', it must match \[A-Za-z0-9._~-\]\{0,128\}"):
        await engine.list_sessions(DEFAULT_NAMESPACE, prefix="a\0")
    with pytest.raises(InvalidArgument, match="there are 65 labels, the limit is 64"):
        await engine.list_sessions(DEFAULT_NAMESPACE, labels={str(number): "" for number in range(65)})


async def test_chunks_and_recalls(engine: Engine) -> None:
    tokens = vectors(1, 23, DIM)
    await fill(engine, "s", tokens)
    result = await engine.attend(
        named("s"), AttendRequest(queries=QUERY.queries, top_k=2, tokens=True, request_id="r1")
    )
    page = await engine.chunks(named("s"), limit=3, keys=True)
    assert [(c.index, c.start, c.stop, c.sealed) for c in page.chunks] == [
        (0, 0, 5, True),
        (1, 5, 10, True),
        (2, 10, 15, True),
    ]
    rest = await engine.chunks(named("s"), cursor=page.cursor, limit=3)
    assert [(c.index, c.stop, c.sealed) for c in rest.chunks] == [(3, 20, True), (4, 23, False)] and rest.cursor is None
    chunks = [*page.chunks, *rest.chunks]
    assert page.chunks[1].key is not None and rest.chunks[0].key is None
    np.testing.assert_allclose(page.chunks[1].key, tokens[5:10].mean(axis=0), rtol=1e-5, atol=1e-6)
    counts = np.bincount(result.chunk_index.ravel(), minlength=5)
    assert [chunk.num_recalls for chunk in chunks] == counts.tolist()
    assert sum(chunk.mass for chunk in chunks) == pytest.approx(2.0, abs=1e-5)
    recall = (await engine.recalls(named("s")))[0]
    assert (recall.request_id, recall.num_queries, recall.top_k, recall.length) == ("r1", 2, 2, 23)
    assert recall.recalled is not None and recall.recalled[0][0].position == result.recalled[0][0].position  # type: ignore[index]
    detail = await engine.chunk(named("s"), 4, embeddings=True, key=True)
    np.testing.assert_array_equal(detail.embeddings, tokens[20:])
    for index in (-1, 5):
        with pytest.raises(ChunkNotFound, match=f"no chunk {index}, it has 5 chunks"):
            await engine.chunk(named("s"), index)
    with pytest.raises(InvalidArgument, match="range is 3 to 24, it must lie within 0 to 23"):
        await engine.read(named("s"), 3, 24, embeddings=True, payloads=False)


async def test_deadlines(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await fill(engine, "s", vectors(1, 3, DIM))
    hold = asyncio.Event()
    loop = asyncio.get_running_loop()
    release = asyncio.run_coroutine_threadsafe
    engine.worker.queue.post(lambda: release(asyncio.wait_for(hold.wait(), 5), loop).result(5) and None)
    with pytest.raises(DeadlineExceeded, match="deadline of 20 ms"):
        await engine.attend(named("s"), AttendRequest(queries=QUERY.queries, timeout_s=0.02))
    hold.set()
    await engine.attend(named("s"), QUERY)
    assert engine.worker.queue.num_skipped == 1


async def test_create_on_append(make_engine: MakeEngine) -> None:
    engine = await make_engine(create_on_append=True)
    await engine.append(named("new"), AppendRequest(embeddings=vectors(1, 3, DIM)))
    assert (await engine.inspect(named("new"))).dim == DIM
    with pytest.raises(InvalidArgument, match=r"embeddings\[0, 0\] is nan"):
        await engine.append(named("refused"), AppendRequest(embeddings=np.full((1, DIM), np.nan, np.float32)))
    with pytest.raises(SessionNotFound):
        await engine.inspect(named("refused"))
    await fill(engine, "expired", vectors(1, 3, DIM), ttl_s=60)
    session_of(engine, "expired").last_used_at = 0
    assert (await engine.append(named("expired"), AppendRequest(embeddings=vectors(1, 2, DIM)))).length == 2


async def test_a_full_disk_is_said_and_nothing_changes(make_engine: MakeEngine, monkeypatch: Any) -> None:
    store = MemoryStore()
    engine = await make_engine(store)
    tokens = vectors(1, 7, DIM)
    await fill(engine, "s", tokens)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise StoreFull("the disk is full")

    monkeypatch.setattr(store, "write", full)
    results = await asyncio.gather(
        *(engine.append(named("s"), AppendRequest(embeddings=tokens)) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, DiskFull) for result in results)
    monkeypatch.undo()
    assert right(tokens, await engine.attend(named("s"), QUERY))
    assert (await engine.append(named("s"), AppendRequest(embeddings=tokens))).start == 7


async def test_a_dead_device_thread_fails_everyone_at_once(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await fill(engine, "s", vectors(1, 3, DIM))

    def die() -> None:
        raise RuntimeError("no such device")

    engine.worker.queue.post(die)
    for call in (
        engine.attend(named("s"), QUERY),
        engine.append(named("s"), AppendRequest(embeddings=vectors(1, 3, DIM))),
    ):
        with pytest.raises(Unhealthy, match="no such device"):
            await call
    assert "no such device" in (engine.unhealthy_reason() or "")


async def test_a_draining_engine_refuses_what_is_new_and_finishes_what_has_begun(engine: Engine) -> None:
    await fill(engine, "s", vectors(1, 3, DIM))
    begun = asyncio.create_task(engine.attend(named("s"), QUERY))
    await asyncio.sleep(0)
    engine.is_draining = True
    for call in (
        engine.attend(named("s"), QUERY),
        engine.inspect(named("s")),
        engine.create(named("t"), CreateRequest(dim=3)),
    ):
        with pytest.raises(Draining, match="takes no new work"):
            await call
    assert (await begun).length == 3


async def test_a_closed_engine_refuses(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await fill(engine, "s", vectors(1, 3, DIM))
    await engine.close()
    with pytest.raises(Draining):
        await engine.attend(named("s"), QUERY)
    assert engine.is_draining


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_tokens_may_come_in_any_memory(engine: Engine, dtype: Any) -> None:
    """Torch takes no read-only array, and what is stored is in order, whatever the strides are."""
    whole = vectors(4, 6, 2 * DIM).round()
    frozen = whole[:, :DIM].copy()
    frozen.flags.writeable = False
    await engine.create(named("s"), CreateRequest(dim=DIM, dtype=dtype))
    for tokens in (frozen, whole[:, :DIM], whole.T.copy().T[:, :DIM]):
        await engine.append(named("s"), AppendRequest(embeddings=tokens))
    found = await engine.read(named("s"), 0, None, embeddings=True, payloads=False)
    assert found.embeddings is not None and np.array_equal(found.embeddings, np.concatenate([frozen] * 3))


async def test_a_caller_may_use_its_array_again(engine: Engine) -> None:
    """Tokens waited for a full chunk in the caller's own memory, where the next append's were seen in their place."""
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE))
    await engine.create(named("whole"), CreateRequest(dim=DIM, chunk_size=SIZE))
    tokens, buffer = vectors(3, 2 * SIZE + 2, DIM), np.empty((1, DIM), np.float32)
    for token in tokens:
        buffer[:] = token
        await engine.append(named("s"), AppendRequest(embeddings=buffer))
    buffer[:] = 0
    await engine.append(named("whole"), AppendRequest(embeddings=tokens))
    query = AttendRequest(queries=tokens[:3])
    results = [await engine.attend(named(name), query) for name in ("s", "whole")]
    np.testing.assert_array_equal(results[0].output, results[1].output)
