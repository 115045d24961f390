"""Lock-step batches: each item is what a call of its own would be, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htm_service.attention.model import RetrievalModel
from htm_service.engine import Engine
from htm_service.errors import HTMError
from htm_service.memory.resident import Resident
from htm_service.reads import runner
from htm_service.reads.runner import Attend
from htm_service.records import (
    AppendRequest,
    AppendResult,
    AttendRequest,
    AttendResult,
    SelectResult,
    StepRequest,
    StepResult,
    TruncateRequest,
    TruncateResult,
)
from storage.base import StoreDamaged
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import go_cold, on_device_thread, session_of
from tests.engine.models import write_model
from tests.engine.test_attend import DIM, fill, vectors
from tests.names import named
from tests.reference import htm_reference, relative_error

RETRIEVAL = RetrievalModel().config


def code_of(outcome: object) -> str:
    return outcome.code if isinstance(outcome, HTMError) else "ok"


def attended(outcome: AttendResult | HTMError) -> AttendResult:
    assert isinstance(outcome, AttendResult), outcome
    return outcome


def appended(outcome: AppendResult | HTMError) -> AppendResult:
    assert isinstance(outcome, AppendResult), outcome
    return outcome


def stepped(outcome: StepResult | HTMError) -> StepResult:
    assert isinstance(outcome, StepResult), outcome
    return outcome


def same(one: AttendResult, other: AttendResult) -> None:
    assert relative_error(one.output, other.output) <= 1e-5
    np.testing.assert_array_equal(one.chunk_index, other.chunk_index)
    np.testing.assert_allclose(one.chunk_weight, other.chunk_weight, atol=1e-5)
    assert one.length == other.length
    assert [[token.payload for token in row] for row in one.recalled or ()] == [
        [token.payload for token in row] for row in other.recalled or ()
    ]


async def admitted(engine: Engine, more_than: int = 0) -> None:
    """Return when something waits for the device, besides so many."""
    while engine.worker.queue.num_waiting <= more_than:  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the device's thread has it, too


class CountingStore(MemoryStore):
    """A store that counts its transactions, and can wait within one."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []

    def write(self, writes: Sequence[Any], now: float) -> Any:
        self.groups.append(len(writes))
        return super().write(writes, now=now)


async def test_each_item_is_answered_as_by_a_call_of_its_own(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Sessions of other lengths, chunk sizes and dtypes, some cold, one empty; a model for each, queries for each."""
    write_model(tmp_path / "plain.safetensors", dim=DIM, heads=3, dim_head=7)
    engine = await make_engine(models_dir=tmp_path)
    kinds: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"chunk_size": 3}, {"open_chunk": "exclude"}]
    names = [f"s{number}" for number in range(12)]
    for number, name in enumerate(names):
        await fill(engine, name, vectors(number, 7 * number % 41, DIM), **kinds[number % 4])
    for name in names[3:6]:
        await go_cold(engine, name)
    requests = [
        AttendRequest(
            queries=vectors(100 + number, 2, DIM),
            top_k=2,
            payloads=True,
            model=(None, "plain", "retrieval")[number % 3],
        )
        for number in range(12)
    ]
    found = await engine.batch_attend([(named(name), one) for name, one in zip(names, requests, strict=True)])
    for name, request, outcome in zip(names, requests, found, strict=True):
        same(attended(outcome), await engine.attend(named(name), request))
    counted = [session_of(engine, name).num_attends for name in names]
    assert counted == [2] * 12, "each is a recall of its session"
    assert {len(await engine.recalls(named(name))) for name in names} == {2}


async def test_one_entry_and_one_transaction(make_engine: MakeEngine) -> None:
    store = CountingStore()
    engine = await make_engine(store)
    names = [f"s{number}" for number in range(40)]
    for number, name in enumerate(names):
        await fill(engine, name, vectors(number, 6, DIM))
    step = StepRequest(AttendRequest(queries=vectors(1, 1, DIM)), AppendRequest(vectors(2, 1, DIM)))
    await engine.batch_step([(named(name), step) for name in names])  # so that what waits for the device is there
    store.groups.clear()
    before = engine.worker.queue.num_batches
    work = asyncio.create_task(engine.batch_step([(named(name), step) for name in names]))
    await admitted(engine)
    assert engine.worker.queue.num_waiting <= 1, "a batch waits as one"
    found = [stepped(outcome) for outcome in await work]
    assert store.groups == [40]
    assert engine.worker.queue.num_batches == before + 1
    assert {(one.attended.length, one.appended.start) for one in found} == {(7, 7)}
    assert found[0].attended.timing.batch_size == 40


async def test_an_item_that_fails_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind among good ones; what failed has changed nothing, and the others are right."""
    store, now = MemoryStore(), 1_000.0
    first = await make_engine(store)
    names = ["good", "nan", "wide", "missing", "expired", "damaged", "model", "conflict", "also good", "a b"]
    names[8] = "also-good"
    for number, name in enumerate(names):
        if name not in ("missing", "a b"):
            options: dict[str, Any] = {"dim": DIM + 1} if name == "wide" else {}
            tokens = vectors(number, 9, options.get("dim", DIM))
            await fill(first, name, tokens, **options, ttl_s=60.0 if name == "expired" else None)
    await first.close()
    damaged = store.get_session(named("damaged"))
    assert damaged is not None
    read_blocks = store.read_blocks

    def read(sid: int, *args: Any) -> Any:
        if sid == damaged.sid:
            raise StoreDamaged("session 'damaged' is damaged at position 0")
        return read_blocks(sid, *args)

    monkeypatch.setattr(store, "read_blocks", read)
    engine = Engine(first.config, store, clock=lambda: now)
    await engine.start()
    try:
        await engine.inspect(named("expired"))
        now += 61.0
        query, token = vectors(50, 1, DIM), vectors(51, 1, DIM)
        nan = query.copy()
        nan[0, 3] = np.nan
        attends = [
            AttendRequest(queries=nan if name == "nan" else query, model="no" if name == "model" else None)
            for name in names
        ]
        appends = [AppendRequest(token, if_length=1 if name == "conflict" else None) for name in names]
        keys = [named(name) for name in names]
        expected = {
            "nan": "invalid_argument",
            "wide": "invalid_argument",
            "missing": "session_not_found",
            "expired": "session_expired",
            "damaged": "session_damaged",
            "model": "model_not_found",
            "a b": "invalid_argument",
        }
        seen = await engine.batch_attend(list(zip(keys, attends, strict=True)))
        assert {name: code_of(one) for name, one in zip(names, seen, strict=True) if code_of(one) != "ok"} == expected
        for name in ("good", "also-good"):
            result = attended(seen[names.index(name)])
            definition = htm_reference(query, vectors(names.index(name), 9, DIM), RETRIEVAL, chunk_size=5)
            assert relative_error(result.output, definition.output) <= 1e-5
        steps = [(key, StepRequest(ask, add)) for key, ask, add in zip(keys, attends, appends, strict=True)]
        found = await engine.batch_step(steps)
        expected["conflict"] = "length_conflict"
        assert {name: code_of(one) for name, one in zip(names, found, strict=True) if code_of(one) != "ok"} == expected
        conflict = found[names.index("conflict")]
        assert isinstance(conflict, HTMError) and conflict.extra == {"length": 9}
        lengths = {name: session_of(engine, name).length for name in names if name in ("good", "also-good", "nan")}
        assert lengths == {"good": 10, "also-good": 10, "nan": 9}
        # What only an append minds, and that a model does not.
        found_appends = await engine.batch_append(list(zip(keys, appends, strict=True)))
        del expected["model"], expected["nan"]
        failed = {name: code_of(one) for name, one in zip(names, found_appends, strict=True) if code_of(one) != "ok"}
        assert failed == expected
    finally:
        await engine.close()


async def test_nothing_this_time(engine: Engine) -> None:
    """An item without tokens is answered where the session is, and writes nothing; its condition counts."""
    for name in "abc":
        await fill(engine, name, vectors(1, 7, DIM))
    nothing, token = np.zeros((0, DIM), np.float32), vectors(2, 1, DIM)
    appends = [AppendRequest(nothing), AppendRequest(token), AppendRequest(nothing, if_length=3)]
    found = await engine.batch_append([(named(name), one) for name, one in zip("abc", appends, strict=True)])
    assert appended(found[0])[:3] == (7, 7, 2) and appended(found[1])[:3] == (7, 8, 2)
    assert code_of(found[2]) == "length_conflict"
    assert [session_of(engine, name).num_appends for name in "abc"] == [1, 2, 1]
    wide = await engine.batch_append([(named("a"), AppendRequest(np.zeros((0, DIM + 1), np.float32)))])
    assert code_of(wide[0]) == "ok", "there is nothing in it that could be wrong"


async def test_appends_make_their_sessions_where_they_may(make_engine: MakeEngine) -> None:
    """As single ones do; what is refused makes none."""
    engine = await make_engine(create_on_append=True)
    await fill(engine, "a", vectors(1, 3, DIM))
    tokens = {"a": vectors(2, 2, DIM), "new": vectors(3, 2, DIM), "bad": np.full((1, DIM), np.inf, np.float32)}
    found = await engine.batch_append([(named(name), AppendRequest(rows)) for name, rows in tokens.items()])
    assert list(map(code_of, found)) == ["ok", "ok", "invalid_argument"]
    assert {session.id: session.length for session in (await engine.list_sessions("default")).sessions} == {
        "a": 5,
        "new": 2,
    }


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def stored(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Engine:
    """An engine on each kind of store."""
    url = "memory://" if request.param == "memory" else request.getfixturevalue(f"{request.param}_url")
    return await make_engine(open_store(url))


async def test_a_repeated_batch_answers_what_the_first_did(stored: Engine) -> None:
    """The key covers all items; one that failed is tried again, one whose body is another now is refused alone."""
    engine = stored
    for name in "abc":
        await fill(engine, name, vectors(1, 7, DIM))

    def step(seed: int, **more: Any) -> StepRequest:
        return StepRequest(
            AttendRequest(queries=vectors(3, 1, DIM), **more),
            AppendRequest(vectors(seed, 2, DIM), idempotency_key="k"),
        )

    first = await engine.batch_step([(named(name), step(4)) for name in ("a", "b", "d")])
    assert list(map(code_of, first)) == ["ok", "ok", "session_not_found"]
    await fill(engine, "d", vectors(1, 7, DIM))
    again = await engine.batch_step([(named("a"), step(4)), (named("b"), step(5)), (named("d"), step(4))])
    assert list(map(code_of, again)) == ["ok", "idempotency_mismatch", "ok"]
    same(stepped(again[0]).attended, stepped(first[0]).attended)
    assert stepped(again[0]).appended[:3] == stepped(first[0]).appended[:3] == (7, 9, 2)
    assert [session_of(engine, name).length for name in "abd"] == [9, 9, 9]
    mask = np.ones(9, np.bool_)
    masked = [(named(name), step(6, mask=mask)) for name in ("a", "c")]
    found = await engine.batch_step(
        [(key, one._replace(append=one.append._replace(idempotency_key="m"))) for key, one in masked]
    )
    assert list(map(code_of, found)) == ["ok", "invalid_argument"], "the mask is of the one session's length"
    repeated = await engine.batch_step(
        [(key, one._replace(append=one.append._replace(idempotency_key="m"))) for key, one in masked]
    )
    assert list(map(code_of, repeated)) == ["ok", "invalid_argument"]
    same(stepped(repeated[0]).attended, stepped(found[0]).attended)


async def test_a_large_batch_is_cut_and_others_come_between(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R9: a call that arrives after a batch of 600 items is next but one on the device, and all answers are right."""
    engine = await make_engine(max_batch_products=8 << 20)  # seven of these queries
    for name in ("s", "t"):
        await fill(engine, name, vectors(1, 41, DIM))
    queries, other = vectors(2, 600, 1, DIM), session_of(engine, "t").resident
    has_begun, may_go, run = threading.Event(), threading.Event(), engine.worker.runner.run
    has_other: list[bool] = []

    def noted(attends: Sequence[Attend]) -> list[AttendResult | SelectResult | Exception]:
        has_other.append(any(attend.resident is other for attend in attends))
        has_begun.set()
        assert may_go.wait(20)
        return run(attends)

    monkeypatch.setattr(engine.worker.runner, "run", noted)
    of_batch = engine.batch_attend([(named("s"), AttendRequest(queries=one)) for one in queries])
    work = asyncio.create_task(of_batch)
    assert await asyncio.to_thread(has_begun.wait, 20)
    before = engine.worker.queue.num_waiting
    of_other = asyncio.create_task(engine.attend(named("t"), AttendRequest(queries=queries[0])))
    await admitted(engine, more_than=before)
    may_go.set()
    found, single = [attended(outcome) for outcome in await work], await of_other
    assert len(has_other) >= 86 and has_other.index(True) <= 2
    whole = await engine.attend(named("s"), AttendRequest(queries=queries[:, 0]))
    assert relative_error(np.concatenate([one.output for one in found]), whole.output) <= 1e-5
    assert relative_error(single.output, whole.output[:1]) <= 1e-5
    many = await engine.batch_attend([(named("s"), AttendRequest(queries=queries[:100, 0])) for _ in range(3)])
    for outcome in many:  # each dearer than a batch of the device
        assert relative_error(attended(outcome).output, whole.output[:100]) <= 1e-5


async def test_what_is_not_there_in_time_fails_alone(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others do not wait for a session that is not read from the store; nobody waits for ever."""
    store = MemoryStore()
    engine = await make_engine(store)
    for name in "abc":
        await fill(engine, name, vectors(1, 9, DIM))
        await engine.attend(named(name), AttendRequest(queries=vectors(2, 1, DIM)))
    slow = await go_cold(engine, "b")
    may_go, read_blocks = threading.Event(), store.read_blocks

    def read(sid: int, *args: Any) -> Any:
        if sid == slow.sid:
            may_go.wait(20)
        return read_blocks(sid, *args)

    monkeypatch.setattr(store, "read_blocks", read)
    request = AttendRequest(queries=vectors(2, 1, DIM), timeout_s=0.3)
    try:
        found = await engine.batch_attend([(named(name), request) for name in "abc"])
    finally:
        may_go.set()
    assert list(map(code_of, found)) == ["ok", "deadline_exceeded", "ok"]
    again = await engine.batch_attend([(named(name), request) for name in "abc"])
    assert list(map(code_of, again)) == ["ok"] * 3


async def test_a_batch_whose_caller_goes_is_not_begun(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_batch_products=2 << 20)
    await fill(engine, "s", vectors(1, 41, DIM))
    work = asyncio.create_task(engine.batch_attend([(named("s"), AttendRequest(queries=vectors(2, 1, DIM)))] * 300))
    await admitted(engine)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await engine.attend(named("s"), AttendRequest(queries=vectors(2, 1, DIM)))
    assert engine.worker.queue.num_skipped > 200
    assert engine.worker.queue.num_waiting == 0


async def test_an_item_that_breaks_the_kernel_breaks_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """R3, R4: what nobody expected of one item is in the log, and not in its error; the others are answered."""
    for name in "abc":
        await fill(engine, name, vectors(1, 9, DIM))
    run = engine.worker.runner.run

    def break_at(attends: Sequence[Attend]) -> list[AttendResult | SelectResult | Exception]:
        if any(attend.resident.id == "b" for attend in attends):
            raise RuntimeError("a secret of the server's")
        return run(attends)

    monkeypatch.setattr(engine.worker.runner, "run", break_at)
    request = AttendRequest(queries=vectors(2, 1, DIM))
    found = await engine.batch_attend([(named(name), request) for name in "abc"])
    assert list(map(code_of, found)) == ["ok", "internal_error", "ok"]
    assert "secret" not in str(found[1]) and "a secret of the server's" in caplog.text


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("seed", range(2))
async def test_mixed_with_single_calls_it_is_some_order_of_single_calls(
    make_engine: MakeEngine, request: pytest.FixtureRequest, kind: str, seed: int
) -> None:
    """Each token has one place; each attend saw the tokens before one length, which no call that came before it passed,
    and which is at least what was acknowledged before it began.
    """
    store = open_store("memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url"))
    engine = await make_engine(store, max_batch_products=6 << 20)
    names = [f"s{number}" for number in range(7)]
    for name in names:
        await fill(engine, name, np.zeros((0, DIM), np.float32))
    chance = random.Random(seed)
    acknowledged = dict.fromkeys(names, 0)
    placed: dict[str, dict[int, int]] = {name: {} for name in names}
    seen: list[tuple[str, int, AttendResult]] = []
    numbers = iter(range(10_000))

    def offload(resident: Resident) -> None:
        if resident.state == "resident":
            engine.worker.cache.offload(resident)

    def token(number: int) -> Any:
        return vectors(1_000 + number, 1, DIM)

    def note(name: str, number: int, result: AppendResult, least: int) -> None:
        assert result.start >= least and result.start not in placed[name]
        placed[name][result.start] = number
        acknowledged[name] = max(acknowledged[name], result.length)

    def note_attend(name: str, query: int, result: AttendResult, least: int) -> None:
        assert result.length >= least
        seen.append((name, query, result))

    async def work(kind: str, some: list[str]) -> None:
        number, least = next(numbers), {name: acknowledged[name] for name in some}
        attend, append = AttendRequest(queries=token(number)), AppendRequest(token(number))
        both = StepRequest(attend, append)
        if kind == "append":
            note(some[0], number, await engine.append(named(some[0]), append), least[some[0]])
        elif kind == "attend":
            note_attend(some[0], number, await engine.attend(named(some[0]), attend), least[some[0]])
        elif kind == "step":
            before, after = await engine.step(named(some[0]), attend, append)
            assert before.length <= after.start
            note_attend(some[0], number, before, least[some[0]])
            note(some[0], number, after, least[some[0]])
        elif kind == "batch_append":
            for name, one in zip(some, await engine.batch_append([(named(it), append) for it in some]), strict=True):
                note(name, number, appended(one), least[name])
        elif kind == "batch_attend":
            for name, seen_of in zip(
                some, await engine.batch_attend([(named(it), attend) for it in some]), strict=True
            ):
                note_attend(name, number, attended(seen_of), least[name])
        else:
            for name, step in zip(some, await engine.batch_step([(named(it), both) for it in some]), strict=True):
                before, after = stepped(step)
                assert before.length <= after.start
                note_attend(name, number, before, least[name])
                note(name, number, after, least[name])

    async def worker() -> None:
        for _ in range(12):
            kind = chance.choice(["append", "attend", "step", "batch_append", "batch_attend", "batch_step"])
            await work(kind, chance.sample(names, chance.randint(1, len(names))))
            resident = session_of(engine, chance.choice(names)).resident
            if chance.random() < 0.2:
                await on_device_thread(engine, lambda one=resident: offload(one))  # type: ignore[misc]

    await asyncio.gather(*(worker() for _ in range(8)))
    tokens = {}
    for name in names:
        assert sorted(placed[name]) == list(range(acknowledged[name])), "no position is there twice, and none lacks"
        stored = await engine.read(named(name), 0, None, embeddings=True, payloads=False)
        expected = [token(placed[name][position])[0] for position in range(acknowledged[name])]
        assert stored.embeddings is not None
        np.testing.assert_array_equal(stored.embeddings, np.array(expected, np.float32).reshape(-1, DIM))
        tokens[name] = stored.embeddings
    for name, number, result in seen:
        definition = htm_reference(token(number), tokens[name][: result.length], RETRIEVAL, chunk_size=5)
        assert relative_error(result.output, definition.output) <= 1e-5


def selected(outcome: SelectResult | HTMError) -> SelectResult:
    assert isinstance(outcome, SelectResult), outcome
    return outcome


def same_select(one: SelectResult, other: SelectResult) -> None:
    np.testing.assert_array_equal(one.chunk_index, other.chunk_index)
    np.testing.assert_allclose(one.chunk_logit, other.chunk_logit, atol=1e-5)
    assert one.length == other.length and one.taken is not None and other.taken is not None
    for name in ("index", "key", "tokens", "visible"):
        np.testing.assert_array_equal(getattr(one.taken, name), getattr(other.taken, name))


async def test_selects_are_those_of_calls_of_their_own(make_engine: MakeEngine) -> None:
    """Some cold, one empty, other chunk sizes, one that is not there; some are done in parts. It is one entry."""
    engine = await make_engine(max_batch_products=40 << 20)
    kinds: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"chunk_size": 3}, {"open_chunk": "exclude"}]
    names = [f"s{number}" for number in range(12)]
    for number, name in enumerate(names):
        await fill(engine, name, vectors(number, 7 * number % 41, DIM), **kinds[number % 4])
    for name in names[3:6]:
        await go_cold(engine, name)
    requests = [
        AttendRequest(queries=vectors(100 + number, 1 + 59 * (number == 7), DIM), top_k=None if number % 2 else 2)
        for number in range(13)
    ]
    items = [(named(name), one) for name, one in zip([*names, "no"], requests, strict=True)]
    found = await engine.batch_select(items)
    assert code_of(found.pop()) == "session_not_found"
    for name, request, outcome in zip(names, requests, found, strict=False):
        same_select(selected(outcome), await engine.select(named(name), request))
    before = engine.worker.queue.num_batches
    named_only = await engine.batch_select(items[8:12], keys=False, tokens=False)
    assert engine.worker.queue.num_batches == before + 1
    assert [selected(one).taken for one in named_only] == [None] * 4
    assert {session_of(engine, name).num_attends for name in names} == {0}, "it is no recall"


async def test_the_limits_of_one_answer_are_those_of_all_its_selects(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are as wide as the one that takes most, so that one is refused where that is too much; the others are not."""
    engine = await make_engine()
    for name, chunk_size in (("a", 5), ("b", 5), ("wide", 10), ("c", 5)):
        await fill(engine, name, vectors(1, 60, DIM), chunk_size=chunk_size)

    def ask(top_k: int) -> AttendRequest:
        return AttendRequest(queries=vectors(2, 1, DIM), top_k=top_k)

    items = [(named("a"), ask(4)), (named("b"), ask(3)), (named("wide"), ask(3)), (named("no"), ask(3))]
    monkeypatch.setattr(runner, "MAX_SELECTED_CHUNKS", 4 * 3)
    found = await engine.batch_select(items)
    assert list(map(code_of, found)) == ["invalid_argument", "ok", "ok", "session_not_found"]
    assert "take 4 chunks, which, for each of 4 sessions, have" in str(found[0]), found[0]
    assert len((await engine.select(named("a"), ask(4))).chunk_index[0]) == 4
    monkeypatch.setattr(runner, "MAX_SELECTED_CHUNKS", 4 * 4)
    monkeypatch.setattr(runner, "MAX_SELECTED_BYTES", 4 * 3 * 10 * DIM * 4)
    found = await engine.batch_select(items, keys=False)
    assert list(map(code_of, found))[:3] == ["invalid_argument", "ok", "ok"], (
        "they have chunks of 10 tokens beside them"
    )


async def test_truncations_are_one_transaction_and_nothing_is_loaded(make_engine: MakeEngine) -> None:
    """The end of an episode: each item as a call of its own, in order where a session is there twice."""
    store = CountingStore()
    engine = await make_engine(store)
    names = [f"s{number}" for number in range(64)]
    tokens = vectors(1, 23, DIM)
    for name in names:
        await fill(engine, name, tokens)
        await engine.attend(named(name), AttendRequest(queries=vectors(2, 1, DIM)))
    loads = (await engine.info()).totals["loads"]
    store.groups.clear()
    lengths = [0, 12, 24, 7, *[0] * 60]
    requests = [TruncateRequest(length, 22 if at == 3 else None) for at, length in enumerate(lengths)]
    items = [(named(name), one) for name, one in zip(names, requests, strict=True)]
    found = await engine.batch_truncate([*items, (named("no"), TruncateRequest(0)), (named("s1"), TruncateRequest(11))])
    assert store.groups == [65]
    assert list(map(code_of, found)) == [
        *("ok", "ok", "invalid_argument", "length_conflict"),
        *["ok"] * 60,
        *("session_not_found", "ok"),
    ]
    conflict = found[3]
    assert isinstance(conflict, HTMError) and conflict.extra == {"length": 23}
    ends = [found[0], found[1], found[-1]]
    assert [one[:2] for one in ends if isinstance(one, TruncateResult)] == [(0, 0), (12, 3), (11, 3)]
    left = {"s0": 0, "s1": 11, "s2": 23, "s3": 23, "s40": 0}
    assert {name: session_of(engine, name).length for name in left} == left
    assert [len(await engine.recalls(named(name))) for name in ("s0", "s1", "s2")] == [0, 0, 1]
    again = await engine.batch_step(
        [
            (named(name), StepRequest(AttendRequest(queries=tokens[:1]), AppendRequest(embeddings=tokens[:1])))
            for name in names
        ]
    )
    for name, one in zip(names, again, strict=True):
        length = left.get(name, 0)
        definition = htm_reference(tokens[:1], tokens[:length], RETRIEVAL, chunk_size=5)
        assert stepped(one).attended.length == length
        assert relative_error(stepped(one).attended.output, definition.output) <= 1e-5
    assert (await engine.info()).totals["loads"] == loads
    assert code_of((await engine.batch_truncate([(named("s0"), TruncateRequest(-1))]))[0]) == "invalid_argument"


async def test_truncations_of_the_same_sessions_do_not_wait_for_each_other(engine: Engine) -> None:
    """Each holds the locks of all its sessions: in the order that they were named, two could wait for ever."""
    for name in "abc":
        await fill(engine, name, vectors(1, 9, DIM))
    async with engine.directory.lock(named("b")):
        one = asyncio.create_task(engine.batch_truncate([(named(name), TruncateRequest(7)) for name in "abc"]))
        other = asyncio.create_task(engine.batch_truncate([(named(name), TruncateRequest(7)) for name in "ca"]))
        await asyncio.sleep(0.05)
    found = await asyncio.wait_for(asyncio.gather(one, other), 20)
    assert [code_of(outcome) for outcomes in found for outcome in outcomes] == ["ok"] * 5


@pytest.mark.parametrize("many", [False, True])
async def test_a_truncation_whose_caller_goes_is_made_to_its_end(make_engine: MakeEngine, many: bool) -> None:
    """Its caller went while it was written: the tokens were gone, and the recalls that had seen them were told on."""
    store = WaitingStore()
    engine = await make_engine(store)
    await fill(engine, "s", vectors(1, 9, DIM))
    await engine.attend(named("s"), AttendRequest(queries=vectors(2, 1, DIM), tokens=True))
    store.may_write.clear()
    work = engine.batch_truncate([(named("s"), TruncateRequest(3))]) if many else engine.truncate(named("s"), 3)
    task = asyncio.ensure_future(work)
    await asyncio.to_thread(store.is_writing.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    store.may_write.set()
    while session_of(engine, "s").length > 3:  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0.001)
    async with engine.directory.lock(named("s")):  # it has that to its end
        assert await engine.recalls(named("s")) == []


class WaitingStore(MemoryStore):
    """A store that can be held up before it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write, self.is_writing = threading.Event(), threading.Event()
        self.may_write.set()

    def write(self, writes: Sequence[Any], now: float) -> Any:
        if not self.may_write.is_set():
            self.is_writing.set()
            self.may_write.wait(20)
        return super().write(writes, now=now)
