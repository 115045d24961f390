"""The engine's one door: create, inspect, append, attend, step, read back; async, on one event loop.

    append -> committer (store thread: one transaction for all that wait) -> device thread: visible -> answer
    attend -> device thread (one batch for all that wait) -> payloads from the store -> answer

Guarantees: an append is durable before it is visible and visible before it is answered; each attend sees one
length of its session; a request that raises has changed nothing, unless it says that it cannot know.
Does not know HTTP or the environment. Bodies and statuses are `api/`'s, bytes at rest `storage/`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from htm_service.attention.model import Model, RetrievalModel
from htm_service.attention.registry import ModelRegistry
from htm_service.config import EngineConfig
from htm_service.errors import (
    DeadlineExceeded,
    Draining,
    InvalidArgument,
    LengthConflict,
    SessionDamaged,
    SessionExpired,
    SessionNotFound,
    Unhealthy,
)
from htm_service.inspection import Inspection, engine_info
from htm_service.kernels import resolve_kernel
from htm_service.memory.device import choose_device
from htm_service.reads import cost as parts
from htm_service.reads.runner import Reader
from htm_service.reads.visibility import Evicted
from htm_service.reads.worker import Attend, DeviceWorker
from htm_service.records import (
    AppendRequest,
    AppendResult,
    AttendRequest,
    AttendResult,
    ChunkDetail,
    ChunkPage,
    CreateRequest,
    EngineInfo,
    Memories,
    ModelInfo,
    Recall,
    SessionChange,
    SessionInfo,
    SessionPage,
)
from htm_service.sessions import validation
from htm_service.sessions.directory import Directory, compare
from htm_service.sessions.session import Session
from htm_service.threads.supervision import Supervisor
from htm_service.writes import behind
from htm_service.writes.appends import Writing
from htm_service.writes.committer import Change, Committer
from htm_service.writes.compaction import Sealer
from htm_service.writes.expiry import Sweeper
from storage.base import Store, Write

SEALING_SHARE = 0.2
"""Of the time that closing may take: to keep the summary keys of the sessions in use."""

T = TypeVar("T")


class Engine:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(self, config: EngineConfig, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.device, self.device_reason = choose_device(config.device)
        self.is_draining = False
        """Set to refuse what is new; what has begun goes on."""
        self._store = store
        self._clock = clock
        retrieval = RetrievalModel(
            summary_scale=config.retrieval_summary_scale, attention_scale=config.retrieval_attention_scale
        )
        self._models = ModelRegistry(config.models_dir, self.device, retrieval)
        self.worker = DeviceWorker(
            Reader(resolve_kernel(self.device)),
            store,
            self.device,
            config,
            on_death=lambda reason: self._supervisor.fail(reason),
        )
        self._committer = Committer(
            store,
            self.worker,
            clock,
            max_waiting=config.max_waiting,
            max_group_bytes=config.max_write_group_bytes,
            on_death=lambda reason: self._supervisor.fail(reason),
        )
        self._writing = Writing(self._committer.batcher, clock)
        device, writer = self.worker.batcher, self._committer.batcher
        heartbeats = {"device": device.heartbeat, "store": writer.heartbeat, "loader": self.worker.loader.heartbeat}
        self._supervisor = Supervisor(heartbeats, [device, writer], config.stuck_s)
        self._directory = Directory(store, self._write, clock, config.recalls_per_session)
        self._inspection = Inspection(store, self.worker)
        self._sweeper = Sweeper(self._directory, store, self._committer, config.sweep_interval_s)
        self._sealer = Sealer(self.worker, self._directory.sessions, self._writing.submit)
        self._upkeep: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the threads, and what is done beside requests, on the running loop."""
        await asyncio.to_thread(self.worker.reader.kernel.warm_up)
        self._store.watch(self._supervisor.fail)
        self.worker.start()
        self._committer.batcher.start()
        beside = (self._sweeper.run(), self._sealer.run(), self._supervisor.run())
        self._upkeep = [asyncio.create_task(work) for work in beside]

    async def close(self, timeout_s: float = 10.0) -> None:
        """Take no new work, finish what was admitted within `timeout_s`, stop. Safe to call twice."""
        self.is_draining = True
        upkeep, self._upkeep = self._upkeep, []
        for task in upkeep:
            task.cancel()
        await asyncio.gather(*upkeep, return_exceptions=True)
        if upkeep:  # so that the next start finds all keys; what is not done in time is computed again
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sealer.finish(), timeout_s * SEALING_SHARE)
        await self._committer.batcher.close(timeout_s)
        await self.worker.batcher.close(timeout_s)
        await asyncio.to_thread(self.worker.loader.close, max(1.0, timeout_s))

    # --- sessions ---

    async def create(self, session_id: str | None, settings: CreateRequest) -> tuple[SessionInfo, bool]:
        """Create a session (True) or confirm that it exists with these settings. Raises SessionConflict."""
        self._check_open()
        if session_id is not None:
            validation.check_id(session_id)
        model_name = settings.model or "retrieval"
        wanted = validation.resolve_settings(settings, model_name, self._models.get(model_name), self.config.dtype)
        session, is_new = await self._directory.create(session_id, wanted)
        if not is_new:
            named = {name for name in ("labels", "ttl_s", "model") if getattr(settings, name) is not None}
            compare(session, wanted, frozenset(named))
        return session.info(), is_new

    async def list_sessions(
        self,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> SessionPage:
        """One page of the sessions, in the order of their ids."""
        self._check_open()
        validation.check_range("limit", limit, 1, 1000)
        validation.check_prefix(prefix)
        validation.check_labels(labels or {})
        return await self._directory.list_page(prefix, labels, cursor, limit)

    async def inspect(self, session_id: str) -> SessionInfo:
        """Settings, length, bytes, residency, times and counters of one session."""
        session = await self._session(session_id)
        await self._writing.behind.settle(session, self.config.default_timeout_s)
        return session.info()

    async def update(self, session_id: str, change: SessionChange) -> SessionInfo:
        """Change labels, `ttl_s` or model."""
        session = await self._session(session_id)
        if change.labels is not None:
            change = replace(change, labels=validation.check_labels(change.labels))
        validation.check_ttl(change.ttl_s)
        if change.model is not None:
            validation.check_model_dim(change.model, self._models.get(change.model), session.settings.dim)
        await self._directory.update(session, change)
        return session.info()

    async def delete(self, session_id: str) -> None:
        """Delete a session and its tokens, from the store and the device, though its settings may be damaged."""
        try:
            session = await self._session(session_id)
        except SessionDamaged:
            sid = await self._directory.delete_unreadable(session_id)
        else:
            await self._directory.delete(session)
            sid = session.sid
        await self._sweeper.purge(sid)

    # --- tokens in, answers out ---

    async def append(self, session_id: str, request: AppendRequest) -> AppendResult:
        """Add tokens at the end: durable, then visible, then answered. All or nothing."""
        self._check_open()
        session = self._directory.known(session_id) or await self._found_or_made(session_id, request)
        behind.check(session)
        session.check_sound()
        request = validation.check_append(request, session.settings.dim)
        return await self._writing.append(session, request)

    async def attend(self, session_id: str, request: AttendRequest) -> AttendResult:
        """Answer queries with HTM attention over the session as it is now, or as it was at `stop`."""
        session = await self._session(session_id)
        request = validation.check_attend(request, session.settings.dim)
        await self._settle(session, request.timeout_s)
        return await self._attend(session, request)

    async def step(
        self, session_id: str, attend: AttendRequest, append: AppendRequest
    ) -> tuple[AttendResult, AppendResult]:
        """Attend to the session as it is, then append. Both are checked before either begins.

        A step repeated with its idempotency key answers what the first one answered: it attends to the session
        as it was before the first one's append.
        """
        session = await self._session(session_id)
        attend = validation.check_attend(attend, session.settings.dim)
        append = validation.check_append(append, session.settings.dim)
        await self._settle(session, attend.timeout_s)
        session.check_sound()
        try:
            attended = await self._attend(session, attend)
        except InvalidArgument:  # a repeated step's masks are as long as the session was
            first = await self._writing.first_append(session, append)
            if first is None:
                raise
            return await self._attend_before(session, attend, first), first
        appended = await self._writing.append(session, append)
        if appended.start < attended.length:  # only a repeated append begins before what was seen
            attended = await self._attend_before(session, attend, appended)
        return attended, appended

    async def read(
        self, session_id: str, start: int, stop: int | None, *, embeddings: bool, payloads: bool
    ) -> Memories:
        """Read tokens start .. stop-1 back (to the end when None), as they are stored."""
        return await self._inspection.read(
            await self._settled(session_id), start, stop, embeddings=embeddings, payloads=payloads
        )

    # --- inspection ---

    async def chunks(
        self, session_id: str, cursor: str | None = None, limit: int = 100, *, keys: bool = False
    ) -> ChunkPage:
        """One page of a session's chunks, in order."""
        return await self._inspection.chunks(await self._settled(session_id), cursor, limit, keys=keys)

    async def chunk(self, session_id: str, index: int, *, embeddings: bool = False, key: bool = False) -> ChunkDetail:
        """One chunk with its tokens' payloads. Raises ChunkNotFound."""
        return await self._inspection.chunk(await self._settled(session_id), index, embeddings=embeddings, key=key)

    async def recalls(self, session_id: str, limit: int = 20) -> list[Recall]:
        """The accounts of the last attends, newest first."""
        validation.check_range("limit", limit, 1, 1000)
        return (await self._session(session_id)).recalls.latest(limit)

    async def info(self) -> EngineInfo:
        """Version, device, dtype with their reasons, models, limits, totals."""
        return await engine_info(
            self.config,
            self._store,
            self.worker,
            self._committer,
            self.device_reason,
            self.models(),
            self._directory.totals(),
        )

    def models(self) -> list[ModelInfo]:
        """The models that are served."""
        return self._models.infos()

    def unhealthy_reason(self) -> str | None:
        """Why the engine can do no work, or None when it can."""
        return self.worker.batcher.unhealthy_reason or self._committer.batcher.unhealthy_reason

    # --- within ---

    def _check_open(self) -> None:
        reason = self.unhealthy_reason()
        if reason is not None:
            raise Unhealthy(reason)
        if self.is_draining:
            raise Draining("the server is stopping and takes no new work")

    async def _session(self, session_id: str) -> Session:
        self._check_open()
        return self._directory.known(session_id) or await self._directory.get(validation.check_id(session_id))

    async def _found_or_made(self, session_id: str, request: AppendRequest) -> Session:
        """The session of an append, which may make it."""
        try:
            return await self._session(session_id)
        except (SessionNotFound, SessionExpired):
            if not self.config.create_on_append:
                raise
        dim = int(request.embeddings.shape[-1])
        validation.check_append(request, dim)  # what is refused makes no session
        await self.create(session_id, CreateRequest(dim=dim))
        return await self._session(session_id)

    async def _settled(self, session_id: str) -> Session:
        session = await self._session(session_id)
        await self._settle(session)
        return session

    async def _settle(self, session: Session, timeout_s: float | None = None) -> None:
        """Wait until all that was acknowledged is visible. Raises, once, that some of it could not be."""
        await self._writing.behind.settle(session, timeout_s or self.config.default_timeout_s)
        behind.check(session)

    async def _attend(self, session: Session, request: AttendRequest) -> AttendResult:
        name = request.model or session.settings.model
        model: Model = self._models.get(name)
        validation.check_model_dim(name, model, session.settings.dim)
        top_k = request.top_k or model.config.top_k
        timeout_s = request.timeout_s or self.config.default_timeout_s
        result = await self._compute(Attend(session, model, request, top_k), timeout_s)
        if request.payloads:
            result = await self._inspection.with_payloads(session, result)
        session.num_attends += 1
        session.num_queries += len(request.queries)
        session.recalls.add(request, result, model=name, top_k=top_k, now=self._clock())
        return result

    async def _attend_before(self, session: Session, request: AttendRequest, appended: AppendResult) -> AttendResult:
        """Attend to the session as it was before this append. Raises LengthConflict when nothing of that is left."""
        stop = appended.start if request.stop is None else min(request.stop, appended.start)
        try:
            return replace(await self._attend(session, replace(request, stop=stop)), length=appended.start)
        except Evicted as error:
            raise LengthConflict(
                f"this step was made when the session's length was {appended.start}, and {error}", length=session.length
            ) from None

    async def _compute(self, attend: Attend, timeout_s: float) -> AttendResult:
        """One attend through the batcher, over what is left of the tokens as of its admission when it comes to it.

        Where nothing is left of them it is admitted anew. Raises LengthConflict when its masks forbid that.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s  # one for all that is tried
        while True:
            length = attend.session.length
            try:
                return await self._compute_as_of(attend, length, deadline, timeout_s)
            except Evicted:
                if attend.request.stop is not None:
                    raise
                if attend.request.mask is not None or attend.request.chunk_mask is not None:
                    raise LengthConflict(
                        f"the masks are of {length} tokens, all of which were evicted before the attend began",
                        length=attend.session.length,
                    ) from None

    async def _compute_as_of(self, attend: Attend, length: int, deadline: float, timeout_s: float) -> AttendResult:
        """In several parts when it costs more than a batch may. Raises Evicted."""
        session, settings = attend.session, attend.session.settings
        cost = parts.products_per_query(
            attend.model.config,
            dim=settings.dim,
            length=length - session.first_position,
            chunk_size=settings.chunk_size,
            top_k=attend.top_k,
        )
        request = attend.request
        if request.stop is None and (request.mask is not None or request.chunk_mask is not None):
            # Masks are as long as the session is now, however long the attend has to wait.
            attend = replace(attend, request=replace(request, stop=length), length=length)
        # What the parts take must fit into half the budget, should none of it be on the device.
        bytes_per_query = attend.top_k * settings.chunk_size * settings.dim * settings.itemsize
        room = self.config.memory_budget_bytes // 2 // bytes_per_query
        max_queries = max(1, min(self.config.max_batch_products // cost, room))
        pieces = parts.split(attend.request, max_queries, length)
        if len(pieces) > 1:
            attend = replace(attend, length=length)
        futures: list[asyncio.Future[AttendResult]] = []
        try:
            for piece in pieces:
                job = replace(attend, request=piece)
                futures.append(self.worker.batcher.submit(job, cost=cost * len(piece.queries), lane=session.sid))
            return parts.merge([await _within(future, deadline, timeout_s) for future in futures], length)
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    async def _write(self, write: Write, session: Session | None) -> object:
        """One write for the directory, which handles what it expects to be refused."""
        return await self._writing.submit(Change(write, session))


async def _within(future: asyncio.Future[T], deadline: float, timeout_s: float) -> T:
    """The future's result; DeadlineExceeded at `deadline`, `timeout_s` after the beginning, on the loop's clock.

    The work is skipped if it has not begun by then.
    """

    def expire() -> None:
        if not future.done():
            future.set_exception(DeadlineExceeded(f"the deadline of {timeout_s * 1e3:.0f} ms passed"))

    timer = asyncio.get_running_loop().call_at(deadline, expire)
    try:
        return await future
    finally:
        timer.cancel()
