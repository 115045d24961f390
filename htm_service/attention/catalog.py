"""The models that were put: found in the store, put, swapped, deleted.

    put -> parsed and folded in a thread -> kept part by part -> its row -> served from the next batch on -> the old
    bytes purged

The store knows which there are; their weights are loaded one after the other when the server has started, or by whoever
names one before that. Runs on the event loop, what takes long beside it. Does not know batches, nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from htm_service.attention.model import Model
from htm_service.attention.model_file import parse_model
from htm_service.attention.registry import RETRIEVAL, ModelRegistry, Name, is_name
from htm_service.config import MAX_MODELS
from htm_service.errors import (
    HTMError,
    InvalidArgument,
    ModelConflict,
    ModelInUse,
    ModelNotFound,
    QuotaExceeded,
    Unhealthy,
    quoted,
)
from htm_service.memory.resident import Resident
from htm_service.records import SHARED_NAMESPACE, ModelInfo, Precondition, SessionKey
from storage import base
from storage.base import MODEL_PART_BYTES, DeleteModel, ModelRow, PutModel, Store, StoreDamaged, StoreError, Write

REFRESH_S = 1.0
"""How often the store is asked which models there are: another server of it may have put one."""
UNKNOWN_S = 0.1
"""How often it is asked for the sake of names that nobody knows."""


class Writer(Protocol):
    """Who writes to the store."""

    async def write(self, write: Write, resident: Resident | None) -> object:
        """Make one write durable, or raise why not."""

    async def upkeep(self, run: Callable[[], bool]) -> bool:
        """Have the thread that writes do a piece of work, between other writes."""


class Loaded(NamedTuple):
    """Which bytes of a model were looked at, and what is wrong with them, if anything."""

    version: int
    error: str | None


NOTHING = Loaded(-1, None)


class Catalog:
    """See the head of this module."""

    def __init__(self, registry: ModelRegistry, store: Store, writer: Writer, device: torch.device) -> None:
        self.num_swaps = 0
        """Models that were replaced by others since the start."""
        self._registry = registry
        self._store = store
        self._writer = writer
        self._device = device
        self._rows: dict[Name, ModelRow] = {}
        self._loaded: dict[Name, Loaded] = {}
        self._locks: WeakValueDictionary[Name, asyncio.Lock] = WeakValueDictionary()
        """A model is put, loaded or deleted by one at a time."""
        self._num_named: dict[str, int] = defaultdict(int)
        """What is being written that names a model, by the model's name."""
        self._is_named = asyncio.Condition()
        self._folding = asyncio.Semaphore(1)
        """One at a time, for it takes all cores there are."""
        self._unfinished: set[int] = set()
        """Versions of which parts are being written."""
        self._has_loose = asyncio.Event()
        self._has_loose.set()  # a server that was killed may have left some
        self._hidden: set[str] = set()
        """Put before there was a file of the name."""
        self._num_changes = 0
        self._reading = asyncio.Lock()
        self._read_at = 0.0

    # --- finding ---

    async def get(self, namespace: str, name: str) -> Model:
        """The model that a name stands for, loaded. Raises InvalidArgument for what is no name, and ModelNotFound."""
        for is_last in (False, True):
            if (model := self._registry.served.find(namespace, name)) is not None:
                return model
            if (key := self._key(namespace, name)) is not None:
                return await self._load(key)
            if not is_name(name) or is_last or time.monotonic() - self._read_at < UNKNOWN_S:
                break
            await self.read()
        raise self._registry.missing(namespace, name)

    @contextlib.asynccontextmanager
    async def named(self, namespace: str, name: str) -> AsyncIterator[Model]:
        """The model, loaded, for a session that is written meanwhile and names it: until then it is neither deleted nor
        replaced, nor is another one put before it. Raises InvalidArgument and ModelNotFound.
        """
        await self.get(namespace, name)
        async with contextlib.AsyncExitStack() as until_changed:
            for space in sorted({namespace, SHARED_NAMESPACE}):
                await until_changed.enter_async_context(self._lock((space, name)))
            model = self._registry.served.find(namespace, name)
            if model is None:
                raise self._registry.missing(namespace, name)
            self._num_named[name] += 1
        try:
            yield model
        finally:
            async with self._is_named:
                self._num_named[name] -= 1
                if not self._num_named[name]:
                    del self._num_named[name]
                self._is_named.notify_all()

    async def _until_unnamed(self, name: str) -> None:
        """Wait for what is being written; who holds the model's lock lets nothing more begin."""
        async with self._is_named:
            await self._is_named.wait_for(lambda: name not in self._num_named)

    def names(self, namespace: str) -> list[str]:
        """Of the models that can be named in a namespace and are served, in order."""
        return [info.name for info in self._infos(namespace, {}) if info.error is None]

    async def infos(self, namespace: str) -> list[ModelInfo]:
        """The models that can be named in a namespace, by name, those that cannot be served too."""
        return self._infos(namespace, await self._counts(namespace))

    async def info(self, namespace: str, name: str) -> ModelInfo:
        """One of them. Raises ModelNotFound, and InvalidArgument for what is no name."""
        if not self._registry.is_everyones(name) and self._key(namespace, name) is None:
            await self.get(namespace, name)  # put by another server, maybe
        return self._info(namespace, name, await self._counts(namespace, name))

    def _infos(self, namespace: str, counts: Mapping[str, int]) -> list[ModelInfo]:
        everyones = [dataclasses.replace(one, num_sessions=counts.get(one.name, 0)) for one in self._registry.infos()]
        known = {one.name for one in everyones}
        put = {name for space, name in self._rows if space in (namespace, SHARED_NAMESPACE)} - known
        return sorted([*everyones, *(self._info(namespace, name, counts) for name in put)], key=lambda one: one.name)

    def _info(self, namespace: str, name: str, counts: Mapping[str, int]) -> ModelInfo:
        for one in self._registry.infos():
            if one.name == name:
                return dataclasses.replace(one, num_sessions=counts.get(name, 0))
        key = self._key(namespace, name)
        if key is None:
            raise self._registry.missing(namespace, name)
        row, loaded = self._rows[key], self._loaded.get(key)
        return ModelInfo(
            name=name,
            source="store",
            hash=row.hash,
            num_bytes=row.num_bytes,
            created_at=row.created_at,
            num_sessions=counts.get(name, 0),
            error=None if loaded is None else loaded.error,
            **row.config,
        )

    def _key(self, namespace: str, name: str) -> Name | None:
        """Whose model a name stands for: the namespace's own, or the shared one."""
        return next((key for key in ((namespace, name), (SHARED_NAMESPACE, name)) if key in self._rows), None)

    async def _counts(self, namespace: str, name: str | None = None) -> Mapping[str, int]:
        try:
            return await asyncio.to_thread(self._store.count_sessions, namespace, name)
        except StoreError as error:
            raise Unhealthy(f"the sessions that name models cannot be counted: {error}") from error

    # --- changing ---

    async def put(
        self, namespace: str, name: str, data: bytes | bytearray, wanted: Precondition, now: float
    ) -> tuple[ModelInfo, bool]:
        """Keep a model file and serve it from the next batch on; whether its name is new.

        Raises InvalidArgument for a name or a file that is none, ModelInUse, ModelConflict, QuotaExceeded. Then
        nothing has changed.
        """
        self._check_name(name)
        key = namespace, name
        async with self._folding:
            model = await asyncio.to_thread(_fold, data, f"model {name!r}", self._device)
        async with self._lock(key):
            before = self._rows.get(key)
            self._check(key, before, wanted)
            is_served = self._registry.served.put.get(key) is not None
            if before is None or before.hash != model.hash or not is_served:
                row = ModelRow(
                    *key, model.hash, dataclasses.asdict(model.config), len(data), now, version=secrets.randbits(62)
                )
                await self._keep(row, data, _must_fit(model, before))
                self.num_swaps += before is not None
                self._serve(row, model)
            return self._info(namespace, name, await self._counts(namespace, name)), before is None

    async def delete(self, namespace: str, name: str, wanted: Precondition) -> None:
        """Forget a model. Raises ModelNotFound, ModelInUse while sessions name it, ModelConflict."""
        self._check_name(name)
        key = namespace, name
        async with self._lock(key):
            if (row := self._rows.get(key)) is None:
                raise ModelNotFound(f"no model is named {name!r} in this namespace", model=name)
            self._check(key, row, wanted)
            await self._until_unnamed(name)
            try:
                await self._writer.write(DeleteModel(*key, everywhere=namespace == SHARED_NAMESPACE), None)
            except base.ModelInUse:
                raise ModelInUse(f"model {name!r} cannot be deleted: sessions name it", model=name) from None
            except base.NoSuchModel:
                raise ModelNotFound(f"no model is named {name!r} in this namespace", model=name) from None
            self._forget(key)

    def _check_name(self, name: str) -> None:
        if self._registry.is_everyones(name):
            whose = "the built-in model" if name == RETRIEVAL else "a file of the models directory"
            raise ModelInUse(f"the name {name!r} belongs to {whose}, name this one otherwise", model=name)
        if not is_name(name):
            raise self._registry.missing("", name)

    def _check(self, key: Name, before: ModelRow | None, wanted: Precondition) -> None:
        current = None if before is None else before.hash
        if not wanted.holds(current):
            found = "there is no model" if current is None else f"the model has the hash {current}"
            raise ModelConflict(f"{found}, which is not what the change of {quoted(key[1])} is for", hash=current)
        if before is None and sum(space == key[0] for space, _ in self._rows) >= MAX_MODELS:
            raise InvalidArgument(f"there are {MAX_MODELS} models in this namespace, which is the limit")

    async def _keep(self, row: ModelRow, data: bytes | bytearray, must_fit: Mapping[str, int]) -> None:
        """Have the store keep a model: part by part, then as what its name stands for."""
        self._unfinished.add(row.version)
        try:
            for number, start in enumerate(range(0, len(data), MODEL_PART_BYTES)):
                part = bytes(memoryview(data)[start : start + MODEL_PART_BYTES])
                await self._writer.upkeep(partial(self._add, row, number, part))
            await self._until_unnamed(row.name)
            await self._writer.write(PutModel(row, must_fit, everywhere=row.namespace == SHARED_NAMESPACE), None)
        except base.ModelInUse as error:
            raise ModelInUse(f"model {row.name!r} cannot be replaced: {error}", model=row.name) from None
        except base.QuotaExceeded as error:
            raise QuotaExceeded(str(error)) from None
        finally:
            self._unfinished.discard(row.version)
            self._has_loose.set()

    def _add(self, row: ModelRow, number: int, part: bytes) -> bool:
        self._store.add_model_part(row.version, number, part)
        return False

    def _serve(self, row: ModelRow, model: Model | None, error: str | None = None) -> None:
        """Have a name stand for these weights, or say why it does not."""
        key = row.namespace, row.name
        before = self._registry.served.put.get(key)
        if model is not None and before is not None:
            model.take_positions(before)
        self._num_changes += 1
        self._rows[key], self._loaded[key] = row, Loaded(row.version, error)
        self._registry.put(key, model)

    def _forget(self, key: Name) -> None:
        self._num_changes += 1
        self._rows.pop(key, None)
        self._loaded.pop(key, None)
        self._registry.drop(key)
        self._has_loose.set()

    # --- as the store has them ---

    async def read(self) -> None:
        """Ask the store which models there are. Raises Unhealthy."""
        async with self._reading:
            num_changes = self._num_changes
            try:
                rows = await asyncio.to_thread(self._store.list_models)
            except StoreError as error:
                raise Unhealthy(f"the models cannot be read from the store: {error}") from error
            self._read_at = time.monotonic()
            if num_changes != self._num_changes:
                return  # what was put meanwhile is newer
            found = {(row.namespace, row.name): row for row in rows if not self._registry.is_everyones(row.name)}
            hidden = {str(SessionKey(row.namespace, row.name)) for row in rows if self._registry.is_everyones(row.name)}
            if not hidden <= self._hidden:
                logging.getLogger(__name__).warning("hidden by files of their names: the models %s", sorted(hidden))
            self._hidden = hidden
            for key in self._rows.keys() - found.keys():
                self._forget(key)
            for key in found.keys() - self._registry.served.put.keys():
                self._registry.put(key, None)
            self._rows = found

    async def run(self) -> None:
        """Load what is not loaded, and purge what nothing stands for, for ever."""
        await asyncio.gather(_again(self._refresh), _again(self._purge))

    async def _refresh(self) -> None:
        for key, row in list(self._rows.items()):
            if self._loaded.get(key, NOTHING).version != row.version:
                with contextlib.suppress(ModelNotFound):
                    await self._load(key)
        await asyncio.sleep(REFRESH_S)
        await self.read()

    async def _purge(self) -> None:
        await self._has_loose.wait()
        self._has_loose.clear()
        try:
            while await self._writer.upkeep(partial(self._store.purge_models, frozenset(self._unfinished))):
                pass
        except HTMError:
            self._has_loose.set()
            raise

    async def _load(self, key: Name) -> Model:
        """A model, whose weights are read if they are not here. Raises ModelNotFound where they cannot be."""
        async with self._lock(key):
            row = self._rows.get(key)
            if row is not None and self._loaded.get(key, NOTHING).version != row.version:
                await self._open(row)
        model, loaded = self._registry.served.put.get(key), self._loaded.get(key)
        if model is None:
            why = "it was deleted" if loaded is None or loaded.error is None else loaded.error
            raise ModelNotFound(f"model {key[1]!r} cannot be served: {why}", model=key[1])
        return model

    async def _open(self, row: ModelRow) -> None:
        try:
            data = await asyncio.to_thread(self._store.read_model, row)
            if data is None:
                raise StoreDamaged("its bytes are not there")
            async with self._folding:
                model = await asyncio.to_thread(_fold, data, f"model {row.name!r}", self._device)
            if model.hash != row.hash:
                raise StoreDamaged(f"its bytes have the hash {model.hash}, not {row.hash}")
        except (StoreDamaged, InvalidArgument) as error:
            text = f"it is damaged: {error}"
            logging.getLogger(__name__).error("model %s of %s is not served: %s", row.name, row.namespace, text)
            self._serve(row, None, text)
        except StoreError as error:
            raise Unhealthy(f"model {row.name!r} cannot be read: {error}") from error
        else:
            self._serve(row, model)

    def _lock(self, key: Name) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def _fold(data: bytes | bytearray, source: str, device: torch.device) -> Model:
    """A model ready to be served, with its positions (a worker thread). Raises InvalidArgument."""
    model = parse_model(bytes(data), source, device)
    model.positions(model.config.chunk_size)
    return model


def _must_fit(model: Model, before: ModelRow | None) -> dict[str, Any]:
    """Of the settings of the sessions that name it, those that the model must not contradict.

    A session may have another chunk size than its model, if it was made so: only a new one can be wrong for it.
    """
    config, old = model.config, {} if before is None else before.config
    changed = {"dim": config.dim} if old.get("dim") != config.dim else {}
    if "chunk_size" in old and old["chunk_size"] != config.chunk_size:
        changed["chunk_size"] = config.chunk_size
    return changed


async def _again(work: Callable[[], Awaitable[None]]) -> None:
    """Do it again and again; after a failure a little later."""
    while True:
        try:
            await work()
        except HTMError as error:
            logging.getLogger(__name__).warning("models are looked after again: %s", error)
            await asyncio.sleep(REFRESH_S)
        except Exception:
            logging.getLogger(__name__).exception("models are looked after again")
            await asyncio.sleep(REFRESH_S)
