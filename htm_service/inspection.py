"""Looking at a session: tokens read back, chunks with their keys and counters, payloads, totals.

Contents and payloads come from the store, keys from the device. Changes nothing.
Does not know HTTP, or how attention is computed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from htm_service import config as limits
from htm_service.config import EngineConfig
from htm_service.cursors import decode_cursor, encode_cursor
from htm_service.dtypes import from_bytes
from htm_service.errors import (
    ChunkNotFound,
    HTMError,
    InvalidArgument,
    SessionDamaged,
    Unhealthy,
)
from htm_service.memory.chunks import NO_PAGE, Chunks
from htm_service.reads.worker import DeviceWorker
from htm_service.records import (
    ChunkDetail,
    ChunkInfo,
    ChunkPage,
    EngineInfo,
    Floats,
    Heat,
    Memories,
    QuotaInfo,
    Tier,
)
from htm_service.sessions import validation
from htm_service.sessions.session import Session
from htm_service.store_errors import still_there, unreadable
from htm_service.version import __version__
from htm_service.writes.committer import Committer
from storage.base import Store, StoreError, TooManyBytes

T = TypeVar("T")

LOOK_AGAIN_S = 0.001
"""After what was read while a truncation was under way."""
CHUNK_NUMBER = re.compile(r"[0-9]{1,15}")
"""What a cursor of chunks holds."""


class Inspection:
    """See the head of this module."""

    def __init__(self, store: Store, worker: DeviceWorker, max_answer_bytes: int) -> None:
        self._store = store
        self._worker = worker
        self._max_answer_bytes = max_answer_bytes

    async def read(
        self,
        session: Session,
        start: int,
        stop: int | None,
        *,
        embeddings: bool,
        payloads: bool,
    ) -> Memories:
        """Tokens start .. stop-1 as they are stored, as far as they were not trimmed.

        Raises InvalidArgument for a range outside the session, and for more than an answer may hold: a long session
        would not fit into memory twice, so it is read in parts.
        """
        return await _between_truncations(
            session, lambda: self._read(session, start, stop, embeddings=embeddings, payloads=payloads)
        )

    async def _read(
        self, session: Session, start: int, stop: int | None, *, embeddings: bool, payloads: bool
    ) -> Memories:
        length = session.length
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise InvalidArgument(f"the range is {start} to {stop}, it must lie within 0 to {length}")
        start = max(start, session.first_position)
        stop = max(start, stop)
        if embeddings:
            self._check_rows(session, stop - start, f"the embeddings of positions {start} to {stop}")
        start, found, texts = await asyncio.to_thread(self._fetch, session, start, stop, embeddings, payloads)
        return Memories(start, max(start, stop), length, found, texts)

    async def chunks(self, session: Session, cursor: str | None, limit: int, *, keys: bool) -> ChunkPage:
        """One page of chunks, with their keys when asked for."""
        validation.check_range("limit", limit, 1, 1000)
        after = decode_cursor(cursor, CHUNK_NUMBER)
        first = int(after) + 1 if after else 0
        if keys:
            self._check_rows(session, min(limit, session.num_chunks), "the summary keys of a page")
        infos, num_chunks = await self._describe(session, first, limit, keys=keys)
        last = infos[-1].index + 1 if infos else first
        return ChunkPage(infos, encode_cursor(str(last - 1)) if infos and last < num_chunks else None)

    async def chunk(self, session: Session, index: int, *, embeddings: bool, key: bool) -> ChunkDetail:
        """One chunk with its tokens' payloads. Raises ChunkNotFound."""
        return await _between_truncations(session, lambda: self._chunk(session, index, embeddings=embeddings, key=key))

    async def _chunk(self, session: Session, index: int, *, embeddings: bool, key: bool) -> ChunkDetail:
        infos, num_chunks = (
            await self._describe(session, index, 1, keys=key) if index >= 0 else ([], session.num_chunks)
        )
        if not infos:
            raise ChunkNotFound(f"session {session.id!r} has no chunk {index}, it has {num_chunks} chunks")
        info = infos[0]
        if info.index > index:
            raise ChunkNotFound(
                f"chunk {index} of session {session.id!r} was trimmed, its chunks begin with {info.index}"
            )
        if embeddings:
            self._check_rows(session, info.stop - info.start, f"the embeddings of chunk {index}")
        start, found, texts = await asyncio.to_thread(self._fetch, session, info.start, info.stop, embeddings, True)
        if start != info.start:
            raise ChunkNotFound(f"chunk {index} of session {session.id!r} is being trimmed")
        return ChunkDetail(info, texts or [], found)

    async def heat(self, session: Session, first: int, last: int | None, bins: int) -> Heat:
        """What recalls took of chunks first .. last-1 in at most `bins` runs; a session that is cold stays so."""
        validation.check_range("bins", bins, 1, limits.MAX_BINS)
        num_chunks = session.num_chunks
        last = num_chunks if last is None else last
        if not 0 <= first <= last <= num_chunks:
            raise InvalidArgument(f"the chunks are {first} to {last}, they must lie within 0 to {num_chunks}")
        num_each = max(1, -(-(last - first) // bins))
        num_recalls, mass = session.recalls.heat(first, last - first, num_each)
        num_resident = np.zeros(len(mass), dtype=np.int64)

        def ask(chunks: Chunks) -> npt.NDArray[np.int64]:
            here = np.flatnonzero(np.array(chunks.pages, dtype=np.int64) != NO_PAGE) + chunks.first_chunk
            return here[(here >= first) & (here < last)]

        if session.resident.state == "resident":
            np.add.at(num_resident, (await self._worker.ask(session.resident, ask) - first) // num_each, 1)
        return Heat(
            first=first,
            num_chunks=last - first,
            num_chunks_each=num_each,
            num_recalls=num_recalls,
            mass=mass,
            num_resident=num_resident,
            length=session.length,
        )

    def _check_rows(self, session: Session, num_rows: int, what: str) -> None:
        """Raise InvalidArgument for more rows of the session's width than an answer may hold, as float32."""
        row_bytes = session.settings.dim * 4
        if num_rows * row_bytes > self._max_answer_bytes:
            raise InvalidArgument(
                f"{what} have {num_rows * row_bytes} bytes, the limit of one answer is {self._max_answer_bytes}: "
                f"read at most {self._max_answer_bytes // row_bytes} at once"
            )

    async def _describe(self, session: Session, first: int, limit: int, *, keys: bool) -> tuple[list[ChunkInfo], int]:
        """At most `limit` chunks from `first` on, or from the first one held, and the number after the last of all."""

        def ask(chunks: Chunks) -> tuple[int, Floats, list[Tier], int]:
            place = max(first - chunks.first_chunk, 0)
            some = slice(place, place + limit)
            tiers: list[Tier] = ["cold" if page == NO_PAGE else "resident" for page in chunks.pages[some]]
            return chunks.first_chunk + place, chunks.keys[some].cpu().numpy().copy(), tiers, chunks.length

        begin, found, tiers, length = await self._worker.ask(session.resident, ask)
        size = session.settings.chunk_size
        infos = []
        for place, key in enumerate(found):
            index = begin + place
            num_recalls, mass, last_at = session.recalls.of_chunk(index)
            infos.append(
                ChunkInfo(
                    index=index,
                    start=index * size,
                    stop=min((index + 1) * size, length),
                    sealed=(index + 1) * size <= length,
                    tier=tiers[place],
                    key_norm=float(np.linalg.norm(key.astype(np.float64))),  # the squares of float32 overflow it
                    num_recalls=num_recalls,
                    mass=mass,
                    last_recalled_at=last_at,
                    key=key if keys else None,
                )
            )
        return infos, -(-length // size)

    def _fetch(
        self, session: Session, start: int, stop: int, embeddings: bool, payloads: bool
    ) -> tuple[int, Floats | None, Sequence[bytes | None] | None]:
        """Embeddings [stop-start, D] and payloads from the store, and where they begin (a worker thread)."""
        found: Floats | None = None
        texts: Sequence[bytes | None] | None = None
        num_missing = 0
        try:
            if embeddings:
                found = np.empty((stop - start, session.settings.dim), dtype=np.float32)
                num_missing = stop - start - (self._copy_tokens(session, start, stop, found) if stop > start else 0)
            if payloads:
                room = self._max_answer_bytes - (0 if found is None else found.nbytes)
                by_position = self._store.read_payload_range(session.sid, start, stop, room)
                texts = [by_position.get(position) for position in range(start, stop)]
            if num_missing or (payloads and stop > start):  # a payload that is not there does not say why
                row = still_there(self._store, session.key, session.sid)
                if start < row.first_position:  # trimmed meanwhile
                    start = row.first_position
                    return self._fetch(session, start, max(start, stop), embeddings, payloads)
                if num_missing:
                    raise StoreError(f"{stop - start - num_missing} of the tokens {start} to {stop} could be read")
        except TooManyBytes as error:
            raise InvalidArgument(
                f"the payloads of positions {start} to {stop} have more bytes than one answer may hold, "
                f"{self._max_answer_bytes} with all else in it: read fewer positions at once"
            ) from error
        except StoreError as error:
            raise _noted(session, unreadable(session.id, error)) from error
        return start, found, texts

    def _copy_tokens(self, session: Session, start: int, stop: int, into: Floats) -> int:
        """Copy what the store has of tokens start .. stop-1; how many these are."""
        settings = session.settings
        num_copied = 0
        for block in self._store.read_blocks(session.sid, start, stop):
            tokens = from_bytes([block.data], settings.dtype, settings.dim).float().numpy()
            low, high = max(start, block.start), min(stop, block.start + block.num_tokens)
            into[low - start : high - start] = tokens[low - block.start : high - block.start]
            num_copied += high - low
        return num_copied


async def _between_truncations(session: Session, look: Callable[[], Awaitable[T]]) -> T:
    """What a look at a session finds, in the store and on the device, while its positions mean the same tokens."""
    while True:
        num_truncated = session.resident.extent.num_truncated
        try:
            found = await look()
        except HTMError:
            if session.resident.num_begun == num_truncated:
                raise
        else:
            if session.resident.num_begun == num_truncated:
                return found
        await asyncio.sleep(LOOK_AGAIN_S)


def _noted(session: Session, error: HTMError) -> HTMError:
    """The error; where it says that the session is damaged, the session takes no more appends."""
    if isinstance(error, SessionDamaged):
        session.damage = error.detail
    return error


async def quota_info(store: Store, namespace: str) -> QuotaInfo:
    """What a namespace may hold, and what it holds. Raises Unhealthy."""
    try:
        quota = await asyncio.to_thread(store.get_quota, namespace)
        held = await asyncio.to_thread(store.totals, namespace)
    except StoreError as error:
        raise Unhealthy(f"what the namespace holds cannot be read: {error}") from error
    return QuotaInfo(
        **asdict(quota),
        num_sessions=held.num_sessions,
        num_tokens=held.num_tokens,
        num_bytes=held.num_bytes + held.num_model_bytes,
    )


async def engine_info(
    config: EngineConfig,
    store: Store,
    worker: DeviceWorker,
    committer: Committer,
    reasons: tuple[str, str],
    models: Sequence[str],
    counted: Mapping[str, int],
    namespace: str | None,
) -> EngineInfo:
    """What the engine is, may take and holds; `reasons` for its device and its kernel. Raises Unhealthy.

    `counted` are more totals, of what is not seen from here. Of one namespace there are only those that say nothing of
    the others.
    """
    try:
        totals = await asyncio.to_thread(store.totals, namespace)
    except StoreError as error:
        raise Unhealthy(f"what the store holds cannot be read: {error}") from error
    cache, queue = worker.cache, worker.queue
    held = {"sessions": totals.num_sessions, "tokens": totals.num_tokens, "stored_bytes": totals.num_bytes}
    ours = {
        "disk_bytes": totals.num_disk_bytes,
        "device_bytes": cache.budget.used_bytes,
        "device_key_bytes": cache.key_bytes,
        "device_sketch_bytes": cache.sketch_bytes,
        "resident_sessions": cache.num_resident,
        "loads": cache.num_loads,
        "offloaded_sessions": cache.reclaim.num_offloaded_sessions,
        "offloaded_pages": cache.reclaim.num_offloaded_pages,
        "fetched_pages": cache.num_fetched_pages,
        "appended_tokens": committer.num_appended_tokens,
        "trimmed_tokens": committer.num_trimmed_tokens,
        "waiting_device": queue.num_waiting,
        "waiting_store": committer.queue.num_waiting,
        "batches": queue.num_batches,
        "skipped": queue.num_skipped + committer.queue.num_skipped,
        **counted,
        "commits": committer.queue.num_batches,
    }
    return EngineInfo(
        version=__version__,
        device=str(cache.device),
        device_reason=reasons[0],
        dtype=config.dtype,
        dtype_reason="configured; each session may name its own",
        kernel=worker.runner.kernel.name,
        kernel_reason=reasons[1],
        models=models,
        limits={
            "memory_budget_bytes": config.memory_budget_bytes,
            "max_waiting": config.max_waiting,
            "max_batch_products": config.max_batch_products,
            "max_dim": limits.MAX_DIM,
            "max_chunk_size": limits.MAX_CHUNK_SIZE,
            "max_top_k": limits.MAX_TOP_K,
            "max_queries": limits.MAX_QUERIES,
            "max_recalled": limits.MAX_RECALLED,
            "max_found": limits.MAX_FOUND,
            "max_oversample": limits.MAX_OVERSAMPLE,
            "max_searched": limits.MAX_SEARCHED,
            "oversample": config.oversample,
            "payload_cache_bytes": config.payload_cache_bytes,
            "max_answer_bytes": config.max_answer_bytes,
        },
        totals=held if namespace is not None else {**held, **ours},
    )
