"""The engine: create, inspect, append, attend, step, read back; async, on one event loop. Read this first.

    append -> appends.py -> the store's thread: one transaction for all that wait, then visible -> answer
    attend -> attends.py -> the device thread: one batch for all that wait -> payloads from the store -> answer

Guarantees: an append is durable before it is visible and visible before it is answered; each attend sees one
length of its session; a request that raises has changed nothing, unless it says that it cannot know.
Does not know HTTP or the environment. Bodies and statuses are `api/`'s, bytes at rest `storage/`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from htm_service import batches
from htm_service.attention.catalog import Catalog
from htm_service.attention.model import RetrievalModel
from htm_service.attention.registry import RETRIEVAL, ModelRegistry
from htm_service.clock import SteadyClock
from htm_service.config import MAX_SEARCHED, EngineConfig
from htm_service.errors import (
    Draining,
    HTMError,
    InvalidArgument,
    SessionDamaged,
    SessionExpired,
    SessionNotFound,
    Unhealthy,
)
from htm_service.inspection import Inspection, engine_info, quota_info
from htm_service.kernels.resolve import resolve_for_start
from htm_service.memory.cache import Cache
from htm_service.memory.device import choose_device
from htm_service.memory.loader import Loader
from htm_service.metrics import Metrics
from htm_service.reads.attends import Attends
from htm_service.reads.runner import Runner
from htm_service.reads.search.searches import Searches
from htm_service.reads.selects import Selects
from htm_service.reads.worker import DeviceWorker, Job
from htm_service.records import (
    DEFAULT_NAMESPACE,
    AppendRequest,
    AppendResult,
    AttendRequest,
    AttendResult,
    ChunkDetail,
    ChunkPage,
    CreateRequest,
    EngineInfo,
    Explanation,
    Heat,
    Key,
    KeyWish,
    Memories,
    ModelInfo,
    Precondition,
    Quota,
    QuotaInfo,
    Recall,
    SearchAllResult,
    SearchRequest,
    SearchResult,
    SelectResult,
    SessionChange,
    SessionInfo,
    SessionKey,
    SessionPage,
    StepRequest,
    StepResult,
    TruncateRequest,
    TruncateResult,
)
from htm_service.sessions import validation
from htm_service.sessions.accounts import Accounts
from htm_service.sessions.directory import Directory, compare
from htm_service.sessions.feed import Feed, Reader
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.payloads import Payloads, Texts, Wanted
from htm_service.sessions.session import Session
from htm_service.threads.batcher import Batcher
from htm_service.threads.supervision import Supervisor, Worker
from htm_service.transfers.exports import Export, Exports
from htm_service.transfers.imports import Imports
from htm_service.writes.appends import Appends
from htm_service.writes.committer import Committer, Work, Written
from htm_service.writes.compaction import Compaction
from htm_service.writes.expiry import Expiry
from htm_service.writes.keys import Keys
from htm_service.writes.steps import Steps
from htm_service.writes.truncation import Truncation
from storage.base import SetQuota, Store

COMPACTION_SHARE = 0.2
"""Of the time that closing may take: to keep the summary keys of the sessions in use."""
ANY = Precondition()
COMPILING = "the compiled one is on its way: a process compiles it, then it takes over"


class Engine:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(self, config: EngineConfig, store: Store, *, clock: Callable[[], float] | None = None) -> None:
        self.config = config
        clock = clock or SteadyClock()
        self.device, self.device_reason = choose_device(config.device)
        self.is_draining = False
        """Set to refuse what is new; what has begun goes on."""
        self.store = store
        self.metrics = Metrics()
        retrieval = RetrievalModel(
            summary_scale=config.retrieval_summary_scale, attention_scale=config.retrieval_attention_scale
        )
        models = ModelRegistry(config.models_dir, self.device, retrieval)

        device: Batcher[Job, object] = Batcher(
            "device",
            max_waiting=config.max_waiting,
            max_cost=config.max_batch_products,
            metrics=self.metrics.of_queue("device"),
        )
        cache = Cache(self.device, config.memory_budget_bytes)
        loader = Loader(store, cache, device)
        kernel, self._compilation = resolve_for_start(self.device, config.kernel_cache)
        self.kernel_reason = "the fastest that this device has" if self._compilation is None else COMPILING
        self.worker = DeviceWorker(device, cache, loader, Runner(kernel), models)

        writer: Batcher[Work, Written] = Batcher(
            "store",
            max_waiting=config.max_waiting,
            max_cost=config.max_write_group_bytes,
            metrics=self.metrics.of_queue("store"),
        )
        self.committer = Committer(store, writer, self.worker, clock, self.metrics.commit_seconds)
        self.feed = Feed()
        """What happens to sessions, for whoever reads along."""
        cached = PayloadCache(config.payload_cache_bytes)
        self.accounts = Accounts(config.recalls_per_session, config.max_recall_bytes, self.feed)
        self.directory = Directory(store, self.committer.write, clock, self.accounts, self.feed, cached)

        self.catalog = Catalog(models, store, self.committer, self.device)
        reader: Batcher[Wanted, Texts] = Batcher(
            "payloads",
            max_waiting=config.max_waiting,
            max_cost=config.max_waiting,
            metrics=self.metrics.of_queue("payloads"),
        )
        self.payloads = Payloads(store, reader, cached, config.max_answer_bytes)
        self._attends = Attends(config, self.catalog, self.worker, self.payloads, self.accounts, clock)
        self._selects = Selects(self.worker, self._attends)
        self._searches = Searches(config, self._attends, self.payloads)
        self._appends = Appends(self.committer, cached, self.feed, clock)
        self._steps = Steps(self._attends, self._appends)
        self._truncation = Truncation(self.directory, self.committer, cached, self.feed, clock)
        self._inspection = Inspection(store, self.worker, config.max_answer_bytes)
        self.expiry = Expiry(self.directory, store, self.committer, config.expiry_interval_s)
        self.compaction = Compaction(self.directory, self.worker, self.committer)
        workers: dict[str, Worker] = {"device": device, "store": writer, "payloads": reader, "loader": loader}
        self.keys = Keys(store, self.committer.write, clock)
        self._exports = Exports(store, self.directory)
        self.imports = Imports(
            store, self.committer, self.directory, self.catalog, clock, max_payload_bytes=config.max_answer_bytes
        )
        self._clock = clock
        self._supervisor = Supervisor(workers, [device.fail, writer.fail, reader.fail], config.stuck_s)
        self._beside: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the threads, and what is done beside requests, on the running loop."""
        await self.keys.read()  # nobody is served before it is known who may call
        await self.catalog.read()
        await asyncio.to_thread(self.worker.runner.kernel.warm_up)
        self.store.watch(self._supervisor.fail)
        self.worker.queue.start(self.worker.run, self.worker.gathering.go_on)
        self.worker.loader.start()
        self.committer.queue.start(self.committer.run)
        self.payloads.queue.start(self.payloads.run)
        beside = (
            self.expiry.run(),
            self.compaction.run(),
            self.keys.run(),
            self.imports.run(),
            self.catalog.run(),
            self.accounts.run(self.directory.sessions),
            self._supervisor.run(),
            self._change_kernel(),
        )
        self._beside = [asyncio.create_task(work) for work in beside]

    async def close(self, timeout_s: float = 10.0) -> None:
        """Take no new work, finish what was admitted within `timeout_s`, stop. Safe to call twice."""
        self.is_draining = True
        beside, self._beside = self._beside, []
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if beside:  # so that the next start finds all keys; what is not done in time is computed again
            for last in (self.compaction.finish, self.keys.note):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s * COMPACTION_SHARE):
                        await last()
        await self.committer.queue.close(timeout_s)
        await self.worker.queue.close(timeout_s)
        await self.payloads.queue.close(timeout_s)
        await asyncio.to_thread(self.worker.loader.close, max(1.0, timeout_s))

    async def _change_kernel(self) -> None:
        """Let the compiled kernel take over once it is there; without it the reference goes on serving."""
        if self._compilation is None:
            return
        try:
            await self._compilation.run()
            self.worker.use(await asyncio.to_thread(self._compilation.load))
            self.kernel_reason = "the fastest that this device has; the reference served until it was compiled"
        except Exception as error:  # whatever it is, the server serves
            self.kernel_reason = f"the compiled one cannot be had: {error}"
            logging.getLogger(__name__).warning("the reference kernel goes on serving, slowly: %s", error)

    # --- sessions ---

    async def create(self, name: SessionKey, settings: CreateRequest) -> tuple[SessionInfo, bool]:
        """Create a session (True) or confirm that it exists with these settings. Raises SessionConflict."""
        self._check_open()
        validation.check_key(name)
        model_name = RETRIEVAL if settings.model is None else settings.model
        async with self.catalog.named(name.namespace, model_name) as model:
            wanted = validation.resolve_settings(settings, model_name, model, self.config.dtype)
            session, is_new = await self.directory.create(name, wanted)
        if not is_new:
            named = {field for field in ("labels", "ttl_s", "model") if getattr(settings, field) is not None}
            compare(session, wanted, frozenset(named))
        return session.info(), is_new

    async def list_sessions(
        self,
        namespace: str,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        cursor: str | None = None,
        limit: int = 100,
        *,
        by_use: bool = False,
    ) -> SessionPage:
        """One page of a namespace's sessions, in the order of their ids, or those used last first."""
        self._check_open()
        validation.check_namespace(namespace)
        validation.check_range("limit", limit, 1, 1000)
        validation.check_prefix(prefix)
        validation.check_labels(labels or {})
        list_page = self.directory.list_by_use if by_use else self.directory.list_page
        return await list_page(namespace, prefix, labels, cursor, limit)

    async def inspect(self, name: SessionKey) -> SessionInfo:
        """Settings, length, bytes, residency, times and counters of one session."""
        return (await self._session(name)).info()

    async def update(self, name: SessionKey, change: SessionChange) -> SessionInfo:
        """Change labels, `ttl_s` or model."""
        session = await self._session(name)
        if change.labels is not None:
            change = replace(change, labels=validation.check_labels(change.labels))
        validation.check_ttl(change.ttl_s)
        if change.model is None:
            await self.directory.update(session, change)
        else:
            async with self.catalog.named(name.namespace, change.model) as model:
                validation.check_model_dim(change.model, model, session.settings.dim)
                await self.directory.update(session, change)
        return session.info()

    async def delete(self, name: SessionKey) -> None:
        """Delete a session and its tokens, from the store and the device, though its settings may be damaged."""
        try:
            session = await self._session(name)
        except SessionDamaged:
            sid = await self.directory.delete_unreadable(name)
        else:
            await self.directory.delete(session)
            sid = session.sid
        await self.expiry.purge(sid)

    async def fork(
        self, name: SessionKey, new: SessionKey, length: int | None = None, labels: Mapping[str, str] | None = None
    ) -> SessionInfo:
        """A new session with the first `length` tokens of one, all when None, that are shared until either changes.

        Raises SessionConflict when the new one is there, InvalidArgument for a length at which it cannot be cut.
        """
        session = await self._session(name)
        validation.check_key(new)
        validation.check_range("length", length or 0, 0, 2**53)
        labels = None if labels is None else validation.check_labels(labels)
        return (await self.directory.fork(session, new, length, labels)).info()

    async def truncate(self, name: SessionKey, length: int, if_length: int | None = None) -> TruncateResult:
        """Forget all tokens from position `length` on, at once and for good; positions are given again."""
        session = await self._session(name)
        return await self._truncation.truncate(session, validation.check_truncate(TruncateRequest(length, if_length)))

    async def delete_sessions(self, namespace: str, prefix: str = "", labels: Mapping[str, str] | None = None) -> int:
        """Delete a namespace's sessions with this prefix and these labels, of which one must be given; how many."""
        self._check_open()
        validation.check_namespace(namespace)
        validation.check_prefix(prefix)
        validation.check_labels(labels or {})
        if not prefix and not labels:
            raise InvalidArgument("neither prefix nor label is given; to delete sessions one of them is needed")
        num_deleted = 0
        async for sids in self.directory.delete_all(namespace, prefix, labels):
            num_deleted += len(sids)
            for sid in sids:
                await self.expiry.purge(sid)
        return num_deleted

    # --- tokens in, answers out ---

    async def append(self, name: SessionKey, request: AppendRequest) -> AppendResult:
        """Add tokens at the end: durable, then visible, then answered. All or nothing."""
        self._check_open()
        session = self.directory.known(name) or await self._found_or_made(name, request)
        session.check_sound()
        return await self._appends.append(session, validation.check_append(request, session.settings.dim))

    async def attend(self, name: SessionKey, request: AttendRequest) -> AttendResult:
        """Answer queries with HTM attention over the session as it is now, or as it was at `stop`."""
        session = await self._session(name)
        return await self._attends.attend(session, validation.check_attend(request, session.settings.dim))

    async def select(
        self, name: SessionKey, request: AttendRequest, *, keys: bool = True, tokens: bool = True
    ) -> SelectResult:
        """Which chunks queries in key space take, and what these hold, for whoever attends elsewhere."""
        session = await self._session(name)
        checked = validation.check_attend(request, session.settings.dim)
        return await self._selects.select(session, checked, keys=keys, tokens=tokens)

    async def search(self, name: SessionKey, request: SearchRequest) -> SearchResult:
        """The tokens that score best, of all that are visible."""
        session = await self._session(name)
        return await self._searches.search(session, validation.check_search(request, session.settings.dim))

    async def search_all(
        self,
        namespace: str,
        request: SearchRequest,
        ids: Sequence[str] | None = None,
        labels: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> SearchAllResult:
        """The tokens that score best of several sessions together: those named, or those with labels and prefix."""
        names = [SessionKey(namespace, name) for name in ids] if ids is not None else None
        if names is None:
            validation.check_prefix(prefix)
            names = await self.directory.keys_of(namespace, prefix, validation.check_labels(labels or {}), MAX_SEARCHED)
        validation.check_range("the number of sessions", len(set(names)), 0, MAX_SEARCHED)
        sessions: list[Session] = []
        for name in dict.fromkeys(names):
            try:
                sessions.append(await self._session(name))
            except (SessionNotFound, SessionExpired):  # since they were listed
                if ids is not None:
                    raise
        for dim, session in {session.settings.dim: session for session in sessions}.items():
            validation.check_search(request, dim, session.id)
        request = validation.check_search(request, request.queries.shape[-1])
        return await self._searches.search_all(sessions, request, are_named=ids is not None)

    async def step(
        self, name: SessionKey, attend: AttendRequest, append: AppendRequest
    ) -> tuple[AttendResult, AppendResult]:
        """Attend to the session as it is, then append. Both are checked before either begins."""
        session = await self._session(name)
        attend = validation.check_attend(attend, session.settings.dim)
        append = validation.check_append(append, session.settings.dim)
        return await self._steps.step(session, attend, append)

    # --- many sessions at once ---

    async def batch_append(self, items: Sequence[tuple[SessionKey, AppendRequest]]) -> list[AppendResult | HTMError]:
        """An append to each of several sessions, none of them twice, in one group of writes."""
        self._check_open()
        return await batches.each(
            items, self.directory.known, self._found_or_made, _check_append, self._appends.append_all
        )

    async def batch_attend(self, items: Sequence[tuple[SessionKey, AttendRequest]]) -> list[AttendResult | HTMError]:
        """An attend to each of several sessions, as one entry of the device's queue."""
        self._check_open()
        attend_all = partial(self._attends.attend_all, num_items=len(items))
        return await batches.each(items, self.directory.known, self._found, _check_attend, attend_all)

    async def batch_select(
        self, items: Sequence[tuple[SessionKey, AttendRequest]], *, keys: bool = True, tokens: bool = True
    ) -> list[SelectResult | HTMError]:
        """A select of each of several sessions, as one entry of the device's queue.

        An answer holds as many chunks for each of them as for the one that takes most, so all are bounded by that.
        """
        self._check_open()
        select_all = partial(self._selects.select_all, num_items=len(items), keys=keys, tokens=tokens)
        return await batches.each(items, self.directory.known, self._found, _check_attend, select_all)

    async def batch_truncate(
        self, items: Sequence[tuple[SessionKey, TruncateRequest]]
    ) -> list[TruncateResult | HTMError]:
        """Truncate several sessions, in order, in one group of writes."""
        self._check_open()
        return await batches.each(
            items, self.directory.known, self._found, _check_truncate, self._truncation.truncate_all
        )

    async def batch_search(self, items: Sequence[tuple[SessionKey, SearchRequest]]) -> list[SearchResult | HTMError]:
        """A search of each of several sessions, as one entry of the device's queue."""
        self._check_open()
        search_each = partial(self._searches.search_each, num_items=len(items))
        return await batches.each(items, self.directory.known, self._found, _check_search, search_each)

    async def batch_step(self, items: Sequence[tuple[SessionKey, StepRequest]]) -> list[StepResult | HTMError]:
        """Attend to several sessions, none of them twice, as they are, then append to them."""
        self._check_open()
        step_all = partial(self._steps.step_all, num_items=len(items))
        return await batches.each(items, self.directory.known, self._found, _check_step, step_all)

    async def read(
        self,
        name: SessionKey,
        start: int,
        stop: int | None,
        *,
        embeddings: bool,
        payloads: bool,
    ) -> Memories:
        """Read tokens start .. stop-1 back (to the end when None)."""
        return await self._inspection.read(
            await self._session(name),
            start,
            stop,
            embeddings=embeddings,
            payloads=payloads,
        )

    # --- whole sessions ---

    async def export_session(self, name: SessionKey) -> Export:
        """A session's file as it is now, with everything in it; to be closed."""
        return await self._exports.begin(await self._session(name))

    async def import_session(
        self, name: SessionKey, parts: AsyncIterator[bytes], num_bytes: int | None = None
    ) -> SessionInfo:
        """The session of a file whose bytes are `parts`, whole or not at all. Raises SessionConflict and others."""
        self._check_open()
        validation.check_key(name)
        return (await self.imports.receive(name, self._while_open(parts), num_bytes)).info()

    # --- inspection ---

    async def explain(self, name: SessionKey, request: AttendRequest, limit: int = 100) -> Explanation:
        """How one query ranks the chunks it sees, and which it takes, as an attend would; it is no recall."""
        session = await self._session(name)
        return await self._attends.explain(
            session, validation.check_explain(request, limit, session.settings.dim), limit
        )

    async def heat(self, name: SessionKey, first: int = 0, last: int | None = None, bins: int = 600) -> Heat:
        """What recalls took of chunks first .. last-1, in at most `bins` runs."""
        return await self._inspection.heat(await self._session(name), first, last, bins)

    async def chunks(
        self, name: SessionKey, cursor: str | None = None, limit: int = 100, *, keys: bool = False
    ) -> ChunkPage:
        """One page of a session's chunks, in order."""
        return await self._inspection.chunks(await self._session(name), cursor, limit, keys=keys)

    async def chunk(self, name: SessionKey, index: int, *, embeddings: bool = False, key: bool = False) -> ChunkDetail:
        """One chunk with its tokens' payloads. Raises ChunkNotFound."""
        return await self._inspection.chunk(await self._session(name), index, embeddings=embeddings, key=key)

    async def recalls(self, name: SessionKey, limit: int = 20) -> list[Recall]:
        """The accounts of the last attends, newest first."""
        validation.check_range("limit", limit, 1, 1000)
        return (await self._session(name)).recalls.latest(limit)

    def listen(self, namespace: str, session_id: str | None = None) -> Reader:
        """A reader, to be closed, of what happens from now on to one session of a namespace, or to all of them."""
        self._check_open()
        self.accounts.settle()
        return self.feed.read(namespace, None if session_id is None else validation.check_id(session_id))

    async def info(self, namespace: str | None = None) -> EngineInfo:
        """Version, device, dtype with their reasons, models, limits, totals: all, or those of one namespace."""
        if namespace is not None:
            validation.check_namespace(namespace)
        attends = self._attends
        counted = {
            "attends": attends.num_attends,
            "attended_queries": attends.num_queries,
            "searches": self._searches.num_searches,
            "searched_queries": self._searches.num_queries,
            **self.payloads.totals(),
        }
        totals = {**counted, **self.directory.totals(), "model_swaps": self.catalog.num_swaps}
        return await engine_info(
            self.config,
            self.store,
            self.worker,
            self.committer,
            (self.device_reason, self.kernel_reason),
            self.catalog.names(namespace or DEFAULT_NAMESPACE),
            totals,
            namespace,
        )

    def unhealthy_reason(self) -> str | None:
        """Why the engine can do no work, or None when it can."""
        queues = (self.worker.queue, self.committer.queue, self.payloads.queue)
        return next((queue.unhealthy_reason for queue in queues if queue.unhealthy_reason is not None), None)

    # --- models ---

    async def models(self, namespace: str) -> list[ModelInfo]:
        """The models that can be named in a namespace, and those that cannot be served, with the reason."""
        self._check_open()
        return await self.catalog.infos(validation.check_namespace(namespace))

    async def model(self, namespace: str, name: str) -> ModelInfo:
        """One of them. Raises ModelNotFound."""
        self._check_open()
        return await self.catalog.info(validation.check_namespace(namespace), name)

    async def put_model(
        self, namespace: str, name: str, data: bytes | bytearray, wanted: Precondition = ANY
    ) -> tuple[ModelInfo, bool]:
        """Keep a model file under a name that is new (True), or replace what has it, from the next batch on.

        Raises ModelInUse, ModelConflict.
        """
        self._check_open()
        return await self.catalog.put(validation.check_namespace(namespace), name, data, wanted, self._clock())

    async def delete_model(self, namespace: str, name: str, wanted: Precondition = ANY) -> None:
        """Forget a model. Raises ModelInUse while sessions name it."""
        self._check_open()
        await self.catalog.delete(validation.check_namespace(namespace), name, wanted)

    # --- callers ---

    async def list_keys(self, namespace: str | None) -> list[Key]:
        """The keys of one namespace, or all, without their secrets."""
        self._check_open()
        return await self.keys.list(namespace)

    async def create_key(self, wish: KeyWish) -> tuple[Key, str]:
        """Make a key; with it its secret, which nobody is told again. Raises KeyExists."""
        self._check_open()
        return await self.keys.create(wish)

    async def revoke_key(self, namespace: str, name: str) -> None:
        """Take a key back. Raises KeyNotFound."""
        self._check_open()
        await self.keys.revoke(namespace, name)

    async def quota(self, namespace: str) -> QuotaInfo:
        """What a namespace may hold, and what it holds."""
        self._check_open()
        return await quota_info(self.store, validation.check_namespace(namespace))

    async def set_quota(self, quota: Quota) -> QuotaInfo:
        """Say what a namespace may hold from now on; what it holds already stays."""
        self._check_open()
        validation.check_quota(quota)
        await self.committer.write(SetQuota(quota), None)
        return await quota_info(self.store, quota.namespace)

    # --- within ---

    def _check_open(self) -> None:
        reason = self.unhealthy_reason()
        if reason is not None:
            raise Unhealthy(reason)
        if self.is_draining:
            raise Draining("the server is stopping and takes no new work")

    async def _while_open(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream that takes long, until the server stops."""
        async for part in parts:
            self._check_open()
            yield part

    async def _session(self, name: SessionKey) -> Session:
        self._check_open()
        return self.directory.known(name) or await self.directory.get(validation.check_key(name))

    async def _found(self, name: SessionKey, _: object) -> Session:
        """The session of an item."""
        return await self._session(name)

    async def _found_or_made(self, name: SessionKey, request: AppendRequest) -> Session:
        """The session of an append, which may make it."""
        try:
            return await self._session(name)
        except (SessionNotFound, SessionExpired):
            if not self.config.create_on_append:
                raise
        dim = int(request.embeddings.shape[-1])
        validation.check_append(request, dim)  # what is refused makes no session
        await self.create(name, CreateRequest(dim=dim))
        return await self._session(name)


def _check_append(session: Session, request: AppendRequest) -> AppendRequest:
    session.check_sound()
    return validation.check_batch_append(request, session.settings.dim)


def _check_attend(session: Session, request: AttendRequest) -> AttendRequest:
    return validation.check_attend(request, session.settings.dim)


def _check_truncate(_: Session, request: TruncateRequest) -> TruncateRequest:
    return validation.check_truncate(request)


def _check_search(session: Session, request: SearchRequest) -> SearchRequest:
    return validation.check_search(request, session.settings.dim)


def _check_step(session: Session, request: StepRequest) -> StepRequest:
    return StepRequest(_check_attend(session, request.attend), _check_append(session, request.append))
