"""Models that are put while the engine serves: which weights an attend is computed with, and what else may happen."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htm_service.attention.convert import from_module
from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_config import ModelConfig
from htm_service.attention.model_file import model_bytes
from htm_service.attention.modules import HTMAttention, HTMBlock
from htm_service.config import MAX_MODELS
from htm_service.engine import Engine
from htm_service.errors import (
    HTMError,
    InvalidArgument,
    ModelConflict,
    ModelInUse,
    ModelNotFound,
    QuotaExceeded,
    SessionNotFound,
)
from htm_service.records import (
    AppendRequest,
    AttendRequest,
    AttendResult,
    CreateRequest,
    Floats,
    Precondition,
    Quota,
    SessionChange,
    SessionKey,
)
from storage.base import MODEL_PART_BYTES, ModelRow, Store
from storage.in_memory import MemoryStore
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.test_transfers import stream
from tests.names import named
from tests.reference import htm_reference, relative_error
from tests.session_files import session_file

DIM, SIZE = 13, 5


class Made:
    """A model of random weights: its file, its hash, and what it answers."""

    def __init__(
        self, seed: int, dim: int = DIM, *, top_k: int = 3, chunk_size: int = SIZE, block: bool = False
    ) -> None:
        torch.manual_seed(seed)
        module = (HTMBlock if block else HTMAttention)(
            dim, heads=3, topk_mems=top_k, mem_chunk_size=chunk_size, dim_head=7
        )
        self.config, self.tensors = from_module(module)
        self.file = model_bytes(self.config, self.tensors)
        self.hash = ProjectedModel(self.config, self.tensors).hash

    def check(self, result: AttendResult, queries: Floats, tokens: Floats) -> None:
        assert (result.model_hash, result.top_k) == (self.hash, self.config.top_k)
        expected = htm_reference(queries, tokens, self.config, self.tensors, chunk_size=SIZE)
        assert relative_error(result.output, expected.output) <= 1e-5


def vectors(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


async def fill(engine: Engine, key: SessionKey, tokens: Floats, model: str = "m") -> None:
    await engine.create(key, CreateRequest(chunk_size=SIZE, dim=tokens.shape[1], model=model))
    await engine.append(key, AppendRequest(embeddings=tokens))


def only_if(hash_: str) -> Precondition:
    return Precondition(match=frozenset({hash_}))


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    return str(request.getfixturevalue(f"{request.param}_url"))


async def test_put_swap_restart_delete(make_engine: MakeEngine, store_url: str) -> None:
    """Nothing is encoded anew: the same tokens are read with other weights, and recalls say with which."""
    first, second, tokens, queries = Made(1), Made(2, block=True, top_k=2), vectors(0, 23, DIM), vectors(1, 4, DIM)
    engine = await make_engine(open_store(store_url))
    info, is_new = await engine.put_model("default", "m", first.file)
    assert is_new and (info.name, info.hash, info.num_bytes, info.source) == ("m", first.hash, len(first.file), "store")
    await fill(engine, named("s"), tokens)
    first.check(await engine.attend(named("s"), AttendRequest(queries=queries)), queries, tokens)
    for _ in range(2):  # again with the same hash: nothing is written
        info, is_new = await engine.put_model("default", "m", bytearray(second.file), only_if(info.hash or ""))
        assert not is_new and (info.hash, info.num_sessions) == (second.hash, 1)
        second.check(await engine.attend(named("s"), AttendRequest(queries=queries)), queries, tokens)
    explained = await engine.explain(named("s"), AttendRequest(queries=queries[:1]))
    assert (explained.attended.model_hash, explained.attended.top_k) == (second.hash, 2)
    recalls = await engine.recalls(named("s"))
    assert [(one.model, one.model_hash, one.top_k) for one in recalls] == [
        ("m", second.hash, 2), ("m", second.hash, 2), ("m", first.hash, 3)
    ]  # fmt: skip
    assert engine.catalog.num_swaps == 1 and (await engine.info()).totals["model_swaps"] == 1
    assert (await engine.info()).models == ["m", "retrieval"]
    if store_url != "memory://":
        await engine.close()
        engine.store.close()
        engine = await make_engine(open_store(store_url))
        assert list(engine.store.verify()) == []
        second.check(await engine.attend(named("s"), AttendRequest(queries=queries)), queries, tokens)
        again = await engine.model("default", "m")
        assert (again.hash, again.created_at, again.num_sessions, again.top_k) == (second.hash, info.created_at, 1, 2)
    with pytest.raises(ModelInUse, match="sessions name it"):
        await engine.delete_model("default", "m")
    await engine.update(named("s"), SessionChange(model="retrieval"))
    await engine.delete_model("default", "m", only_if(second.hash))
    assert [one.name for one in await engine.models("default")] == ["retrieval"]
    with pytest.raises(ModelNotFound, match="there are: retrieval"):
        await engine.attend(named("s"), AttendRequest(queries=queries, model="m"))
    await purged(engine.store, 0)


async def purged(store: Store, num_bytes: int) -> None:
    """Nothing is kept but the bytes of models that there are."""
    assert store.totals().num_model_bytes == num_bytes
    await asyncio.to_thread(lambda: [None for _ in iter(store.purge_models, False)])


@contextlib.asynccontextmanager
async def held(engine: Engine) -> Any:
    """The device thread does nothing meanwhile: what is admitted waits."""
    go_on = threading.Event()

    def wait() -> None:
        go_on.wait(30)

    engine.worker.queue.post(wait)
    try:
        yield
    finally:
        go_on.set()


async def test_the_weights_are_those_of_the_moment_when_the_batch_is_formed(make_engine: MakeEngine) -> None:
    """Those of the admission were taken, which may be long before. A model that went meanwhile answers nevertheless."""
    first, second, tokens, queries = Made(1), Made(2), vectors(0, 23, DIM), vectors(1, 4, DIM)
    engine = await make_engine()
    await engine.put_model("default", "m", first.file)
    await fill(engine, named("s"), tokens)
    request = AttendRequest(queries=queries)
    async with held(engine):
        waiting = asyncio.create_task(engine.attend(named("s"), request))
        await asyncio.sleep(0.05)
        await engine.put_model("default", "m", second.file)
    second.check(await waiting, queries, tokens)
    await engine.put_model("default", "gone", first.file)
    async with held(engine):
        waiting = asyncio.create_task(engine.attend(named("s"), AttendRequest(queries=queries, model="gone")))
        await asyncio.sleep(0.05)
        await engine.delete_model("default", "gone")
    first.check(await waiting, queries, tokens)


async def test_a_swap_to_one_that_takes_more_chunks_or_has_another_width(make_engine: MakeEngine) -> None:
    """What waits is admitted anew for more chunks; one whose session does not name the model gets a clear error."""
    engine = await make_engine()
    first, more, wide = Made(1), Made(2, top_k=5), Made(3, 11)
    tokens, queries = vectors(0, 33, DIM), vectors(1, 4, DIM)
    await engine.put_model("default", "m", first.file)
    await fill(engine, named("s"), tokens)
    async with held(engine):
        waiting = asyncio.create_task(engine.attend(named("s"), AttendRequest(queries=queries)))
        await asyncio.sleep(0.05)
        await engine.put_model("default", "m", more.file)
    more.check(await waiting, queries, tokens)
    await engine.put_model("default", "other", first.file)
    async with held(engine):
        waiting = asyncio.create_task(engine.attend(named("s"), AttendRequest(queries=queries, model="other")))
        await asyncio.sleep(0.05)
        await engine.put_model("default", "other", wide.file)
    with pytest.raises(InvalidArgument, match="model 'other' has width 11, the session has 13"):
        await waiting


async def test_a_request_in_parts_is_of_one_model(make_engine: MakeEngine) -> None:
    """Its parts are many batches, between which others come, and swaps."""
    made = [Made(seed) for seed in range(2)]
    by_hash = {one.hash: one for one in made}
    tokens, queries = vectors(0, 67, DIM), vectors(1, 40, DIM)
    engine = await make_engine(max_batch_products=4 << 20)
    await engine.put_model("default", "m", made[0].file)
    await fill(engine, named("s"), tokens)
    is_done = asyncio.Event()

    async def push() -> None:
        number = 1
        while not is_done.is_set():
            await engine.put_model("default", "m", made[number % 2].file)
            number += 1

    pushing = asyncio.create_task(push())
    seen: list[str] = []
    for _ in range(15):
        result = await engine.attend(named("s"), AttendRequest(queries=queries))
        by_hash[result.model_hash].check(result, queries, tokens)
        seen.append(result.model_hash)
    is_done.set()
    await pushing
    assert set(seen) == by_hash.keys() and engine.catalog.num_swaps > 5
    assert engine.worker.queue.num_batches > 15 * 10


async def test_two_learners_and_what_sessions_need(make_engine: MakeEngine, store_url: str) -> None:
    engine = await make_engine(open_store(store_url))
    one, two, wide, long = Made(1), Made(2), Made(3, 11), Made(4, chunk_size=7)
    only_new = Precondition(none_match=frozenset({"*"}))
    await engine.put_model("default", "m", one.file, only_new)
    for wanted in (only_new, only_if(two.hash), Precondition(none_match=frozenset({one.hash}))):
        with pytest.raises(ModelConflict, match=f"the model has the hash {one.hash}") as conflict:
            await engine.put_model("default", "m", two.file, wanted)
        assert conflict.value.extra == {"hash": one.hash}
    for wanted in (only_if("*"), only_if(one.hash)):
        with pytest.raises(ModelConflict, match="there is no model"):
            await engine.put_model("default", "n", two.file, wanted)
    with pytest.raises(ModelConflict):
        await engine.delete_model("default", "m", only_if(two.hash))
    await engine.put_model("default", "m", wide.file)
    await engine.put_model("default", "m", one.file)
    await fill(engine, named("s"), vectors(0, 3, DIM))
    await engine.create(named("other"), CreateRequest(dim=DIM, model="m", chunk_size=9))
    with pytest.raises(ModelInUse, match="its dim would be 11, and a session that names it has 13"):
        await engine.put_model("default", "m", wide.file)
    with pytest.raises(ModelInUse, match="its chunk_size would be 7, and a session that names it has"):
        await engine.put_model("default", "m", long.file)
    assert (await engine.model("default", "m")).hash == one.hash, "what is refused changes nothing"
    await engine.put_model("default", "m", two.file)
    with pytest.raises(ModelInUse, match="'retrieval' belongs to the built-in model"):
        await engine.put_model("default", "retrieval", one.file)
    with pytest.raises(ModelInUse):
        await engine.delete_model("default", "retrieval")
    for name in ("a@b", "", "..", "x" * 129):
        with pytest.raises(InvalidArgument, match="must match"):
            await engine.put_model("default", name, one.file)
        with pytest.raises(InvalidArgument, match="must match"):
            await engine.model("default", name)
    for file in (b"", b"garbage", one.file[:-1], one.file[:200]):
        with pytest.raises(InvalidArgument, match=r"^model 'm': not a safetensors file"):
            await engine.put_model("default", "m", file)
    await engine.set_quota(Quota("default", max_bytes=2 * len(one.file)))
    with pytest.raises(QuotaExceeded):
        await engine.put_model("default", "third", Made(9, 40).file)
    assert (await engine.quota("default")).num_bytes == 3 * DIM * 4 + len(two.file)
    await purged(engine.store, len(two.file))


async def test_namespaces_have_their_own_and_all_use_the_shared(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    shared, own, wide = Made(1), Made(2), Made(3, 11)
    tokens, queries = vectors(0, 23, DIM), vectors(1, 4, DIM)
    await engine.put_model("shared", "m", shared.file)
    for space in ("blue", "red"):
        await fill(engine, SessionKey(space, "s"), tokens)
    await engine.put_model("blue", "m", own.file)
    answers = {}
    for space, model in (("blue", own), ("red", shared)):
        answers[space] = await engine.attend(SessionKey(space, "s"), AttendRequest(queries=queries))
        model.check(answers[space], queries, tokens)
        (info, _) = await engine.models(space)
        assert (info.hash, info.num_sessions) == (model.hash, 1)
    with pytest.raises(ModelInUse):
        await engine.put_model("shared", "m", wide.file)
    with pytest.raises(ModelInUse):
        await engine.delete_model("shared", "m")
    with pytest.raises(ModelNotFound, match="in this namespace"):
        await engine.delete_model("red", "m")
    await engine.delete(SessionKey("red", "s"))
    await engine.put_model("shared", "m", wide.file)  # blue has its own
    own.check(await engine.attend(SessionKey("blue", "s"), AttendRequest(queries=queries)), queries, tokens)
    await engine.delete_model("shared", "m")
    assert [info.name for info in await engine.models("red")] == ["retrieval"]


async def test_a_file_has_its_name_for_itself(make_engine: MakeEngine, sqlite_url: str, tmp_path: Path) -> None:
    """Also one that came after a model of its name: that one is hidden, and there again when the file is gone."""
    first, second = Made(1), Made(2)
    engine = await make_engine(open_store(sqlite_url))
    await engine.put_model("default", "m", first.file)
    await engine.close()
    engine.store.close()
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes(second.file)
    engine = await make_engine(open_store(sqlite_url), models_dir=folder)
    info = await engine.model("default", "m")
    assert (info.hash, info.source) == (second.hash, "file")
    for change in (engine.put_model("default", "m", first.file), engine.delete_model("default", "m")):
        with pytest.raises(ModelInUse, match="a file of the models directory"):
            await change
    assert [one.name for one in await engine.models("default")] == ["m", "retrieval"]
    await engine.close()
    engine.store.close()
    engine = await make_engine(open_store(sqlite_url))
    assert (await engine.model("default", "m")).hash == first.hash


async def test_damaged_bytes_concern_their_model_alone(
    make_engine: MakeEngine, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, tokens, queries = Made(1), Made(2), vectors(0, 23, DIM), vectors(1, 4, DIM)
    engine = await make_engine(open_store(sqlite_url))
    await engine.put_model("default", "m", first.file)
    await engine.put_model("default", "whole", second.file)
    await fill(engine, named("s"), tokens)
    await engine.close()
    engine.store.close()
    with contextlib.closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection, connection:
        of_m = "(SELECT version FROM models WHERE name = 'm')"
        changed = f"UPDATE model_parts SET data = zeroblob(length(data)) WHERE version = {of_m}"
        assert connection.execute(changed).rowcount == 1
    engine = await make_engine(open_store(sqlite_url))
    with pytest.raises(ModelNotFound, match="'m' cannot be served: it is damaged: part 0 of its bytes does not match"):
        await engine.attend(named("s"), AttendRequest(queries=queries))
    info = await engine.model("default", "m")
    assert info.error is not None and (info.hash, info.dim) == (first.hash, DIM)
    assert "model m of default is not served: it is damaged" in caplog.text
    result = await engine.attend(named("s"), AttendRequest(queries=queries, model="whole"))
    second.check(result, queries, tokens)
    assert (await engine.info()).models == ["retrieval", "whole"]
    await engine.put_model("default", "m", first.file)  # the same again heals it
    first.check(await engine.attend(named("s"), AttendRequest(queries=queries)), queries, tokens)


async def test_what_another_server_of_the_store_put_is_found(make_engine: MakeEngine) -> None:
    first, second, tokens, queries = Made(1), Made(2), vectors(0, 23, DIM), vectors(1, 4, DIM)
    store = MemoryStore()
    one, other = await make_engine(store), await make_engine(store)
    await asyncio.sleep(0.2)
    await one.put_model("default", "m", first.file)
    await fill(other, named("s"), tokens)  # named at once, though nobody has told
    first.check(await other.attend(named("s"), AttendRequest(queries=queries)), queries, tokens)
    await one.put_model("default", "m", second.file)
    deadline = time.monotonic() + 10
    while (await other.attend(named("s"), AttendRequest(queries=queries))).model_hash != second.hash:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


class SlowStore(MemoryStore):
    """One to which megabytes take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[int] = []
        self.has_begun = threading.Event()

    def add_model_part(self, version: int, number: int, data: bytes) -> None:
        self.has_begun.set()
        time.sleep(0.1)
        self.parts.append(len(data))
        super().add_model_part(version, number, data)


async def test_appends_go_between_the_parts_of_a_large_model(make_engine: MakeEngine) -> None:
    """As one transaction it would hold all of them up."""
    store = SlowStore()
    engine = await make_engine(store)
    large = Made(1, 512)
    await engine.create(named("s"), CreateRequest(dim=DIM))
    putting = asyncio.create_task(engine.put_model("default", "m", large.file))
    await asyncio.to_thread(store.has_begun.wait)
    for _ in range(2):
        await engine.append(named("s"), AppendRequest(embeddings=vectors(0, 2, DIM)))
        assert not putting.done()
    await putting
    assert sum(store.parts) == len(large.file) and max(store.parts) == MODEL_PART_BYTES
    rows: list[ModelRow] = store.list_models()
    assert store.read_model(rows[0]) == large.file


async def test_one_namespace_has_so_many_models(make_engine: MakeEngine) -> None:
    """They stay loaded, so their number is what bounds the memory they take."""
    engine, files = await make_engine(), files_of_many()
    for number in range(MAX_MODELS):
        await engine.put_model("default", f"m{number}", next(files))
    with pytest.raises(InvalidArgument, match="there are 100 models in this namespace"):
        await engine.put_model("default", "more", next(files))
    await engine.put_model("default", "m3", next(files))
    await engine.put_model("blue", "more", next(files))


def files_of_many() -> Iterator[bytes]:
    config = ModelConfig(dim=2, heads=1, dim_head=1)
    _, tensors = from_module(HTMAttention(2, heads=1, dim_head=1))
    while True:
        yield model_bytes(config, {name: torch.randn_like(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("naming", ["create", "update", "import"])
@pytest.mark.parametrize("change", ["deleted", "of another width"])
async def test_a_model_stays_while_a_session_that_names_it_is_written(
    make_engine: MakeEngine, naming: str, change: str
) -> None:
    """One was deleted in between, and another put that did not fit: the session named what could not serve it."""
    engine, is_free = await make_engine(MemoryStore()), threading.Event()
    await engine.create(named("old"), CreateRequest(dim=DIM, chunk_size=SIZE))

    async def name() -> None:
        if naming == "create":
            await engine.create(named("new"), CreateRequest(dim=DIM, model="m"))
        elif naming == "update":
            await engine.update(named("old"), SessionChange(model="m"))
        else:
            file = session_file(vectors(4, 3, DIM), dim=DIM, model="m")
            await engine.import_session(named("new"), stream(file))

    async def change_it() -> None:
        if change == "deleted":
            await engine.delete_model("default", "m")
        else:
            await engine.put_model("default", "m", Made(2, DIM + 1).file)

    def hold() -> None:
        is_free.wait(20)

    for acts in ([name, change_it], [change_it, name]):
        await engine.put_model("default", "m", Made(1).file)
        is_free.clear()
        engine.committer.queue.post(hold)
        tasks = []
        for act in acts:
            tasks.append(asyncio.create_task(act()))
            await asyncio.sleep(0.05)
        is_free.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(outcome, HTMError) for outcome in outcomes) == 1, outcomes
        for key in (named("new"), named("old")):
            with contextlib.suppress(SessionNotFound):
                await engine.attend(key, AttendRequest(queries=vectors(3, 1, DIM)))
        await engine.delete_sessions("default", prefix="new")
        await engine.update(named("old"), SessionChange(model="retrieval"))
        with contextlib.suppress(ModelNotFound):
            await engine.delete_model("default", "m")
