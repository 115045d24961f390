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
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from htm_service import parts, validation
from htm_service.committer import Change, Committer
from htm_service.config import EngineConfig
from htm_service.device import choose_device
from htm_service.device_worker import Attend, DeviceWorker
from htm_service.directory import Directory, compare
from htm_service.dtypes import to_bytes, to_tokens
from htm_service.errors import (
    DeadlineExceeded,
    DiskFull,
    IdempotencyMismatch,
    InvalidArgument,
    LengthConflict,
    SessionNotFound,
    Unhealthy,
)
from htm_service.inspection import Inspection, engine_info
from htm_service.kernels import resolve_kernel
from htm_service.models import Model, ModelRegistry, RetrievalModel
from htm_service.reader import Reader
from htm_service.records import (
    AppendRequest,
    AppendResult,
    AttendRequest,
    AttendResult,
    ChunkDetail,
    ChunkPage,
    EngineInfo,
    Memories,
    ModelInfo,
    Recall,
    SessionChange,
    SessionInfo,
    SessionPage,
    SessionSettings,
    Timing,
)
from htm_service.session import Session
from storage.base import (
    Append,
    Appended,
    KeyReused,
    NoSuchSession,
    Refused,
    SessionFull,
    Store,
    StoreError,
    StoreFull,
    Write,
    WrongLength,
)

LARGE_BYTES = 256 << 10
"""Tensors above this are converted off the event loop."""

NO_LENGTH = -1
"""An `if_length` that no session has."""

T = TypeVar("T")


class Engine:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(self, config: EngineConfig, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.device, self.device_reason = choose_device(config.device)
        self.is_draining = False
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
            on_death=lambda reason: self._committer.batcher.fail(reason),
        )
        self._committer = Committer(
            store,
            self.worker,
            clock,
            max_waiting=config.max_waiting,
            max_group_bytes=config.max_write_group_bytes,
        )
        self._directory = Directory(store, self._write, clock, config.recalls_per_session)
        self._inspection = Inspection(store, self.worker)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the two worker threads and the sweeper, on the running loop."""
        await asyncio.to_thread(self.worker.reader.kernel.warm_up)
        self.worker.batcher.start()
        self._committer.batcher.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self, timeout_s: float = 10.0) -> None:
        """Take no new work, finish what was admitted within `timeout_s`, stop. Safe to call twice."""
        self.is_draining = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        await self._committer.batcher.close(timeout_s)
        await self.worker.batcher.close(timeout_s)
        self.worker.residency.close()

    # --- sessions ---

    async def create(self, session_id: str | None, settings: SessionSettings) -> tuple[SessionInfo, bool]:
        """Create a session (True) or confirm that it exists with these settings. Raises SessionConflict."""
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
        validation.check_range("limit", limit, 1, 1000)
        return await self._directory.list_page(prefix, labels, cursor, limit)

    async def inspect(self, session_id: str) -> SessionInfo:
        """Settings, length, bytes, residency, times and counters of one session."""
        return (await self._session(session_id)).info()

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
        """Delete a session and its tokens, from the store and the device."""
        await self._directory.delete(await self._session(session_id))

    # --- tokens in, answers out ---

    async def append(self, session_id: str, request: AppendRequest) -> AppendResult:
        """Add tokens at the end: durable, then visible, then answered. All or nothing."""
        try:
            session = await self._session(session_id)
        except SessionNotFound:
            if not self.config.create_on_append:
                raise
            await self.create(session_id, SessionSettings(dim=int(request.embeddings.shape[-1])))
            session = await self._session(session_id)
        request = validation.check_append(request, session.settings.dim)
        return await self._append(session, request)

    async def attend(self, session_id: str, request: AttendRequest) -> AttendResult:
        """Answer queries with HTM attention over the session as it is now, or as it was at `stop`."""
        session = await self._session(session_id)
        return await self._attend(session, validation.check_attend(request, session.settings.dim))

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
        try:
            attended = await self._attend(session, attend)
        except InvalidArgument:  # a repeated step's masks are as long as the session was
            first = await self._first_append(session, append)
            if first is None:
                raise
            return await self._attend_before(session, attend, first), first
        appended = await self._append(session, append)
        if appended.start < attended.length:  # only a repeated append begins before what was seen
            attended = await self._attend_before(session, attend, appended)
        return attended, appended

    async def read(
        self, session_id: str, start: int, stop: int | None, *, embeddings: bool, payloads: bool
    ) -> Memories:
        """Read tokens start .. stop-1 back (to the end when None), as they are stored."""
        return await self._inspection.read(
            await self._session(session_id), start, stop, embeddings=embeddings, payloads=payloads
        )

    # --- inspection ---

    async def chunks(
        self, session_id: str, cursor: str | None = None, limit: int = 100, *, keys: bool = False
    ) -> ChunkPage:
        """One page of a session's chunks, in order."""
        return await self._inspection.chunks(await self._session(session_id), cursor, limit, keys=keys)

    async def chunk(self, session_id: str, index: int, *, embeddings: bool = False, key: bool = False) -> ChunkDetail:
        """One chunk with its tokens' payloads. Raises ChunkNotFound."""
        return await self._inspection.chunk(await self._session(session_id), index, embeddings=embeddings, key=key)

    async def recalls(self, session_id: str, limit: int = 20) -> list[Recall]:
        """The accounts of the last attends, newest first."""
        validation.check_range("limit", limit, 1, 1000)
        return (await self._session(session_id)).recalls.latest(limit)

    async def info(self) -> EngineInfo:
        """Version, device, dtype with their reasons, models, limits, totals."""
        return await engine_info(
            self.config, self._store, self.worker, self._committer, self.device_reason, self.models()
        )

    def models(self) -> list[ModelInfo]:
        """The models that are served."""
        return self._models.infos()

    def unhealthy_reason(self) -> str | None:
        """Why the engine can do no work, or None when it can."""
        return self.worker.batcher.unhealthy_reason or self._committer.batcher.unhealthy_reason

    # --- within ---

    async def _session(self, session_id: str) -> Session:
        return await self._directory.get(validation.check_id(session_id))

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
        """Attend to the session as it was before this append."""
        stop = appended.start if request.stop is None else min(request.stop, appended.start)
        return replace(await self._attend(session, replace(request, stop=stop)), length=appended.start)

    async def _compute(self, attend: Attend, timeout_s: float) -> AttendResult:
        """One attend through the batcher, in several parts when it costs more than a batch may."""
        session, settings, length = attend.session, attend.session.settings, attend.session.length
        cost = parts.products_per_query(
            attend.model.config, dim=settings.dim, length=length, chunk_size=settings.chunk_size, top_k=attend.top_k
        )
        pieces = parts.split(attend.request, max(1, self.config.max_batch_products // cost), length)
        deadline = asyncio.get_running_loop().time() + timeout_s  # one for all parts
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

    async def _first_append(self, session: Session, request: AppendRequest) -> AppendResult | None:
        """What an append answered when its idempotency key came first; None when it never came. Writes nothing."""
        if request.idempotency_key is None:
            return None
        try:
            return await self._append(session, request, only_repeat=True)
        except LengthConflict:
            return None

    async def _append(self, session: Session, request: AppendRequest, *, only_repeat: bool = False) -> AppendResult:
        """Write tokens; with `only_repeat`, raises LengthConflict instead when this append was not made before."""
        started = time.monotonic()
        if request.embeddings.nbytes > LARGE_BYTES:
            change = await asyncio.to_thread(_prepare, session, request, only_repeat)
        else:
            change = _prepare(session, request, only_repeat)
        written = await self._write_change(change)
        assert isinstance(written, Appended)
        if not written.replayed:
            session.num_appends += 1
            session.updated_at = self._clock()
        num_chunks = -(-written.length // session.settings.chunk_size)
        return AppendResult(written.start, written.length, num_chunks, Timing(store_s=time.monotonic() - started))

    async def _write(self, write: Write, session: Session | None) -> object:
        """One write for the directory, which handles what it expects to be refused."""
        return await self._submit(Change(write, session))

    async def _write_change(self, change: Change) -> object:
        """One append; the store's refusals become the domain's errors."""
        session = change.session
        assert session is not None
        try:
            return await self._submit(change)
        except NoSuchSession:
            raise SessionNotFound(f"there is no session {session.id!r}") from None
        except WrongLength as error:
            wanted = change.write.if_length if isinstance(change.write, Append) else None
            raise LengthConflict(
                f"if_length is {wanted}, the session's length is {error.length}", length=error.length
            ) from None
        except SessionFull as error:
            raise InvalidArgument(
                f"the append would make session {session.id!r} longer than its max_tokens {error.max_tokens}; "
                f"its length is {error.length}",
                length=error.length,
            ) from None
        except KeyReused as error:
            raise IdempotencyMismatch(str(error)) from None

    async def _submit(self, change: Change) -> object:
        cost = len(change.write.data) if isinstance(change.write, Append) else 1
        try:
            lane = None if change.session is None else change.session.sid
            return await self._committer.batcher.submit(change, cost=max(1, cost), lane=lane)
        except StoreFull as error:
            raise DiskFull(str(error)) from None
        except StoreError as error:
            if isinstance(error, Refused):
                raise
            raise Unhealthy(f"the store failed: {error}") from error

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.sweep_interval_s)
            try:
                await self._directory.sweep()
            except Exception:
                logging.getLogger(__name__).exception("the sweep of expired sessions failed and is tried again")


def _prepare(session: Session, request: AppendRequest, only_repeat: bool) -> Change:
    """A checked append as a write for the store, with its tokens for the device; see `Engine._append`."""
    tokens = to_tokens(request.embeddings, session.settings.dtype)
    data = to_bytes(tokens)
    write = Append(
        session.sid,
        len(tokens),
        data,
        request.payloads,
        request.episode,
        NO_LENGTH if only_repeat else request.if_length,  # a store looks for the key before it compares lengths
        request.idempotency_key,
        _digest(data, request) if request.idempotency_key is not None else b"",
    )
    return Change(write, session, tokens)


def _digest(data: bytes, request: AppendRequest) -> bytes:
    """What must be the same when an idempotency key comes again."""
    digest = hashlib.sha256(data)
    digest.update(repr((request.payloads, request.episode, request.if_length)).encode())
    return digest.digest()


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
