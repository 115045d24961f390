"""Whole sessions out of one engine and into another: equal, or nothing at all."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htm_service import config
from htm_service.engine import Engine
from htm_service.errors import (
    HTMError,
    InvalidArgument,
    LengthConflict,
    ModelNotFound,
    QuotaExceeded,
    SessionConflict,
    SessionDamaged,
    SessionNotFound,
)
from htm_service.records import AppendRequest, AttendRequest, CreateRequest, Quota, SessionInfo, SessionKey
from htm_service.transfers import exports, imports
from storage.base import STAGED, Store
from storage.resolve import open_readonly, open_store
from tests.databases import new_database
from tests.engine.conftest import MakeEngine
from tests.names import named
from tests.session_files import parsed, session_file

DIM = 7


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Each call opens another store of one kind."""
    numbers = iter(range(100))

    def make() -> Store:
        if request.param == "memory":
            return open_store("memory://")
        if request.param == "sqlite":
            return open_store(new_database(tmp_path / f"{next(numbers)}.sqlite3"))
        return open_store(request.getfixturevalue("new_postgresql_url")())

    return make


async def stream(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
        await asyncio.sleep(0)


async def exported(engine: Engine, name: str = "s") -> bytes:
    export = await engine.export_session(named(name))
    try:
        data = b"".join([piece async for piece in export.pieces()])
    finally:
        export.close()
    assert len(data) == export.num_bytes
    return data


async def fill(engine: Engine, num_appends: int = 23, **settings: Any) -> SessionInfo:
    """Appends of a few tokens each, some with payloads, under some episodes, the last of them -1."""
    rng = np.random.default_rng(5)
    await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=5, **settings))
    for number in range(num_appends):
        tokens = rng.standard_normal((1 + number % 4, DIM)).astype(np.float32)
        payloads = None if number % 3 == 0 else [b'{"n":%d}' % number, *[None] * (len(tokens) - 1)]
        episode = None if number < 7 else -1 if number > 19 else number // 5
        await engine.append(named("s"), AppendRequest(tokens, payloads, episode))
    return await engine.inspect(named("s"))


async def answers(engine: Engine, info: SessionInfo, name: str = "s") -> list[Any]:
    """What may be seen of a session: some attends, all that is read back."""
    queries = np.random.default_rng(9).standard_normal((3, DIM)).astype(np.float32)
    found: list[Any] = []
    for wanted in (
        {"top_k": 2},
        {"stop": info.length - 2, "top_k": 3},
        {"episodes": [2], "top_k": 3},
        {"episodes": [-1]},
    ):
        request = AttendRequest(queries=queries, tokens=True, payloads=True, **wanted)
        answer = await engine.attend(named(name), request)
        found += [answer.output, answer.recalled]
    memories = await engine.read(named(name), 0, None, embeddings=True, payloads=True)
    return [*found, memories.embeddings, memories.start, memories.payloads]


def same(one: Sequence[Any], other: Sequence[Any]) -> None:
    for left, right in zip(one, other, strict=True):
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            assert repr(left) == repr(right)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_a_session_is_the_same_elsewhere(
    make_engine: MakeEngine,
    new_store: Callable[[], Store],
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
) -> None:
    """From memory into every kind of store, whose server has another dtype by default; and back, to the byte."""
    for module in (imports, exports):
        monkeypatch.setattr(module, "PAYLOADS_AT_ONCE", 3)
    monkeypatch.setattr(imports, "PORTION_BYTES", 64)
    monkeypatch.setattr(exports, "PIECE_BYTES", 128)
    settings = {"dtype": dtype, "labels": {"k": "ü\n"}, "max_tokens": 40, "on_full": "evict_oldest", "ttl_s": 60.5}
    there = await make_engine()
    info = await fill(there, **settings)
    assert info.first_position > 0
    data = await exported(there)
    here = await make_engine(new_store(), dtype="float16", create_on_append=True)
    told = await here.import_session(named("s"), stream(data, 37), len(data))
    for name in ("first_position", "length", "stored_bytes", "num_chunks", *settings):
        assert getattr(told, name) == getattr(info, name), name
    same(await answers(here, told), await answers(there, info))
    assert await exported(here) == data, "and it comes out as it went in"
    (listed,) = (await here.list_sessions("default")).sessions
    assert listed.id == "s"
    more = AppendRequest(np.ones((3, DIM), np.float32))
    assert (await here.append(named("s"), more)).start == info.length


async def test_it_is_a_safetensors_file(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await fill(engine)
    tensors, params = parsed(await exported(engine))
    memories = await engine.read(named("s"), 0, None, embeddings=True, payloads=True)
    np.testing.assert_array_equal(tensors["embeddings"], memories.embeddings)
    assert set(tensors["episodes"].tolist()) == {-1, 1, 2, 3, -(2**63)}
    bounds, text = tensors["payload_offsets"].tolist(), tensors["payloads"].tobytes()
    texts = [text[low:high] or None for low, high in itertools.pairwise(bounds)]
    assert texts == list(memories.payloads or ())
    assert (params["format"], params["version"], params["settings"]["dim"]) == ("htm-session", 1, DIM)


async def test_an_empty_session(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await engine.create(named("s"), CreateRequest(dim=DIM))
    data = await exported(engine)
    assert (await engine.import_session(named("t"), stream(data))).length == 0
    assert await exported(engine, "t") == data


async def test_what_the_library_writes_is_taken(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    info = await engine.import_session(named("s"), stream(session_file(first_position=4)))
    assert (info.first_position, info.length, info.labels) == (4, 7, {"agent": "7"})
    memories = await engine.read(named("s"), 0, None, embeddings=True, payloads=True)
    assert memories.payloads == [b'{"n":0}', None, b'{"n":2}'] and memories.start == 4


async def nothing_is_left(engine: Engine) -> None:
    """Neither to see nor at rest, once what was deleted is purged."""
    assert (await engine.list_sessions("default")).sessions == []
    assert engine.store.list_sessions(STAGED) == []
    await engine.expiry.expire()
    assert list(engine.store.verify()) == []
    assert engine.store.totals().num_sessions == 0


CHANGED = {"tensors": {"embeddings": np.ones((3, 3), np.float64)}}
WRONG: dict[str, tuple[bytes, str]] = {
    "no file": (b"hello, this is not a file", "no session's"),
    "nothing": (b"", "cut off"),
    "another format": (session_file(params={"format": "model"}), "format 'model'"),
    "a later version": (session_file(params={"version": 2}), "version '2'"),
    "a version that is no number": (session_file(params={"version": True}), "version 'True'"),
    "NaN": (session_file([[1, 0, 0], [0, np.nan, 0], [0, 0, 1]]), "position 1 holds NaN"),
    "infinity in float16": (session_file([[1, 0, 0], [0, 1, 0], [0, 0, np.inf]], dtype="float16"), "position 2 holds"),
    "a payload that is no JSON": (session_file(payloads=[b"", b"{", b""]), "payload at position 1 is not JSON"),
    "a payload that is no object": (session_file(payloads=[b"", b"", b"7"]), "position 2 is no JSON object"),
    "offsets that go back": (
        session_file(tensors={"payload_offsets": np.array([0, 9, 2, 14])}),
        "payload_offsets must grow",
    ),
    "offsets that do not begin": (session_file(tensors={"payload_offsets": np.array([1, 7, 7, 14])}), "begin with 1"),
    "offsets that end early": (session_file(tensors={"payload_offsets": np.array([0, 7, 7, 9])}), "end with 9"),
    "an episode too large": (session_file(episodes=[1, 2**60, 3]), f"an episode is {2**60}"),
    "too few episodes": (session_file(episodes=[1, 2]), "tensor episodes"),
    "another dtype": (session_file(**CHANGED), "tensor embeddings"),  # type: ignore[arg-type]
    "one tensor too many": (session_file(tensors={"more": np.zeros(1, np.uint8)}), "the tensors are"),
    "positions that are no chunk's": (session_file(first_position=3), "first_position is 3"),
    "more than max_tokens": (session_file(max_tokens=2), "its max_tokens is 2"),
    "a width of a text": (session_file(params={"settings": {**parsed(session_file())[1]["settings"], "dim": "3"}}), ""),
    "a width of nothing": (session_file(np.zeros((3, 0)), dim=0), "dim is 0"),
    "no checksums": (session_file(params={"checksums": {}}), "checksums must be"),
    "more at the end": (session_file() + b"\0", "goes on"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_refused_and_leaves_nothing(make_engine: MakeEngine, what: str) -> None:
    data, why = WRONG[what]
    engine = await make_engine()
    with pytest.raises(InvalidArgument) as caught:
        await engine.import_session(named("s"), stream(data))
    assert why in caught.value.detail
    await nothing_is_left(engine)


async def test_a_torn_or_altered_file_leaves_nothing(
    make_engine: MakeEngine,
    new_store: Callable[[], Store],
) -> None:
    """Cut at any place, or with any one bit flipped."""
    source = await make_engine()
    await fill(source, 9)
    data = await exported(source)
    engine = await make_engine(new_store())
    chance = random.Random(3)
    for _ in range(40):
        with pytest.raises(InvalidArgument):
            await engine.import_session(named("s"), stream(data[: chance.randrange(len(data))]))
        at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        altered = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        with pytest.raises(HTMError) as caught:  # a name of another model is none that is there
            await engine.import_session(named("s"), stream(altered))
        assert isinstance(caught.value, InvalidArgument | ModelNotFound), f"bit {bit} of byte {at}"
    await nothing_is_left(engine)
    assert (await engine.import_session(named("s"), stream(data))).length == (await source.inspect(named("s"))).length


async def test_the_body_must_be_as_long_as_it_says(make_engine: MakeEngine) -> None:
    """What is cut off is refused before any of it is written."""
    engine, data = await make_engine(), session_file()
    with pytest.raises(InvalidArgument, match="cut off"):
        await engine.import_session(named("s"), stream(data), len(data) - 1)
    await nothing_is_left(engine)


async def test_what_may_not_be(make_engine: MakeEngine) -> None:
    """A name that is taken, at the start or by the end; a quota; a model that is not there."""
    engine, data = await make_engine(), session_file()
    reached: list[bytes] = []

    async def watched(then: Any = None) -> AsyncIterator[bytes]:
        async for part in stream(data, 100):
            reached.append(part)
            yield part
        if then is not None:
            await then()

    async def create() -> None:
        await engine.create(named("s"), CreateRequest(dim=3))

    with pytest.raises(SessionConflict):
        await engine.import_session(named("s"), watched(create))
    assert (await engine.inspect(named("s"))).length == 0 and engine.store.list_sessions(STAGED) == []
    reached.clear()
    with pytest.raises(SessionConflict, match="there is a session 's' already"):
        await engine.import_session(named("s"), watched())
    assert not reached, "nothing is read where it is known that nothing will be taken"
    await engine.delete(named("s"))
    for limits in ({"max_sessions": 0}, {"max_tokens": 2}, {"max_bytes": 35}):
        await engine.set_quota(Quota("default", **limits))
        with pytest.raises(QuotaExceeded):
            await engine.import_session(named("s"), stream(data))
    await engine.set_quota(Quota("default", max_tokens=3))
    with pytest.raises(ModelNotFound):
        await engine.import_session(named("s"), stream(session_file(model="nobody")))
    await nothing_is_left(engine)
    await engine.import_session(named("s"), stream(data))
    assert (await engine.quota("default")).num_tokens == 3


async def test_while_it_comes_nobody_sees_it(
    make_engine: MakeEngine,
    new_store: Callable[[], Store],
) -> None:
    """Neither in listings nor in counts; and one that is cancelled, or whose sender goes, leaves nothing."""
    engine = await make_engine(new_store())
    data = session_file(np.ones((10_000, 3)), [b"{}"] * 10_000, [1] * 10_000)
    for how in ("cancel", "lost"):
        is_there, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(there: asyncio.Event = is_there, go_on: asyncio.Event = go_on) -> AsyncIterator[bytes]:
            async for part in stream(data[:-1000], 100_000):
                yield part
            there.set()
            await go_on.wait()
            raise ConnectionError("the client has gone")

        importing = asyncio.create_task(engine.import_session(named("s"), slowly()))
        await asyncio.wait_for(is_there.wait(), 20)
        assert (await engine.info()).totals["sessions"] == 0 == (await engine.info()).totals["tokens"]
        assert (await engine.list_sessions("default")).sessions == []
        with pytest.raises(SessionNotFound):
            await engine.inspect(named("s"))
        assert len(engine.store.list_sessions(STAGED)) == 1
        for call in (engine.list_sessions(STAGED), engine.delete_sessions(STAGED, "0"), engine.info(STAGED)):
            with pytest.raises(InvalidArgument, match="the namespace is ''"):
                await call
        with pytest.raises(InvalidArgument):
            await engine.delete(SessionKey(STAGED, engine.store.list_sessions(STAGED)[0].id))
        await engine.imports.discard_left()
        assert len(engine.store.list_sessions(STAGED)) == 1, "it is under way"
        importing.cancel() if how == "cancel" else go_on.set()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else ConnectionError):
            await importing
        await nothing_is_left(engine)


async def test_what_a_process_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    """The first engine is dropped in the middle, as a kill would."""
    url = f"sqlite:///{tmp_path / 'htm.sqlite3'}"
    store = open_store(url)
    engine = Engine(config.EngineConfig(device="cpu"), store)
    await engine.start()
    data = session_file(np.ones((200_000, 3)), [b""] * 200_000, [1] * 200_000)
    is_there = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        async for part in stream(data[:-8], 100_000):
            yield part
        is_there.set()
        await asyncio.Event().wait()

    importing = asyncio.create_task(engine.import_session(named("s"), stalled()))
    await asyncio.wait_for(is_there.wait(), 20)
    store.close()
    importing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await importing
    await engine.close()
    left = open_readonly(url)
    assert len(left.list_sessions(STAGED)) == 1
    left.close()
    store = open_store(url)
    engine = Engine(config.EngineConfig(device="cpu"), store)
    await engine.start()
    try:
        async with asyncio.timeout(10):
            while store.list_sessions(STAGED):  # noqa: ASYNC110 - it is the store's to say
                await asyncio.sleep(0.01)
        await nothing_is_left(engine)
    finally:
        await engine.close()
        store.close()


async def test_what_changes_while_it_is_exported(make_engine: MakeEngine) -> None:
    """What is appended is not in it; what is trimmed or deleted ends it before its last byte."""
    engine = await make_engine()
    info = await fill(engine, max_tokens=40, on_full="evict_oldest")
    more = AppendRequest(np.ones((2, DIM), np.float32))

    async def read(meanwhile: Callable[[], Any]) -> int:
        export = await engine.export_session(named("s"))
        num = 0
        try:
            await meanwhile()
            async for piece in export.pieces():
                num += len(piece)
        finally:
            export.close()
        assert num == export.num_bytes
        return num

    await read(lambda: engine.append(named("s"), AppendRequest(np.ones((1, DIM), np.float32))))
    with pytest.raises(LengthConflict, match="export it again"):
        await read(lambda: engine.append(named("s"), more._replace(embeddings=np.ones((9, DIM), np.float32))))
    assert (await engine.inspect(named("s"))).first_position > info.first_position
    with pytest.raises(SessionNotFound):
        await read(lambda: engine.delete(named("s")))


async def test_a_damaged_session_is_not_exported(make_engine: MakeEngine, tmp_path: Path) -> None:
    """It is known before the first byte is sent."""
    import sqlite3

    path = tmp_path / "htm.sqlite3"
    engine = await make_engine(open_store(f"sqlite:///{path}"))
    await fill(engine)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE blocks SET checksum = checksum + 1 WHERE start = 6")
    connection.close()
    with pytest.raises(SessionDamaged):
        await engine.export_session(named("s"))
