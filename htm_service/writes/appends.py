"""The way of an append, from its checked request to its answer; and of every other write to the store's thread.

An append is answered when it is durable and visible, or taken by `behind.py` where its caller asked for less. What
the store refuses is told in the domain's words. Runs on the event loop. Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

from htm_service.dtypes import to_bytes
from htm_service.errors import (
    DiskFull,
    HTMError,
    IdempotencyMismatch,
    InvalidArgument,
    LengthConflict,
    SessionNotFound,
    Unhealthy,
)
from htm_service.records import AppendRequest, AppendResult, Timing
from htm_service.sessions.session import Session
from htm_service.threads.batcher import Batcher
from htm_service.writes.behind import WriteBehind
from htm_service.writes.committer import Change, Work, Written
from storage.base import (
    Append,
    Appended,
    KeyReused,
    NoSuchSession,
    Refused,
    SessionFull,
    StoreError,
    StoreFull,
    Write,
    WrongLength,
)

LARGE_BYTES = 256 << 10
"""Embeddings above this are converted off the event loop."""

NO_LENGTH = -1
"""An `if_length` that no session has."""


class Writing:
    """See the head of this module. `batcher` is the store thread's."""

    def __init__(self, batcher: Batcher[Work, Written], clock: Callable[[], float]) -> None:
        self._batcher = batcher
        self._clock = clock
        self.behind = WriteBehind(self._hand_over)

    async def append(self, session: Session, request: AppendRequest, *, only_repeat: bool = False) -> AppendResult:
        """Write tokens; with `only_repeat`, raises LengthConflict instead when this append was not made before."""
        started = time.monotonic()
        if request.embeddings.nbytes > LARGE_BYTES:
            change = await asyncio.to_thread(_prepare, session, request, only_repeat)
        else:
            change = _prepare(session, request, only_repeat)
        taken = self.behind.take(session, change) if request.durability == "memory" and not only_repeat else None
        written = taken or await self._write(session, change)
        if not written.replayed:
            if session.first_position:
                session.recalls.forget(session.first_chunk)
            session.num_appends += 1
            session.updated_at = self._clock()
        num_chunks = -(-written.length // session.settings.chunk_size)
        return AppendResult(written.start, written.length, num_chunks, Timing(store_s=time.monotonic() - started))

    async def first_append(self, session: Session, request: AppendRequest) -> AppendResult | None:
        """What an append answered when its idempotency key came first; None when it never came. Writes nothing."""
        if request.idempotency_key is None:
            return None
        try:
            return await self.append(session, request, only_repeat=True)
        except LengthConflict:
            return None

    async def submit(self, change: Change) -> object:
        """One write of any kind. Raises what the store refused as it is, for who expects it."""
        try:
            return await self._hand_over(change)
        except Refused:
            raise
        except StoreError as error:
            raise _failure(error) from error

    async def _write(self, session: Session, change: Change) -> Appended:
        """One durable append; the store's refusals become the domain's errors."""
        session.num_disk_appends = number = session.num_disk_appends + 1
        session.tip = None
        try:
            written = await self._hand_over(change)
        except Refused as error:
            raise _refusal(error, session, change.write) from None
        except StoreError as error:
            raise _failure(error) from error
        assert isinstance(written, Appended)
        if number == session.num_disk_appends and not written.replayed:  # no other one began meanwhile
            session.tip = written.length
        return written

    def _hand_over(self, change: Change) -> asyncio.Future[Written]:
        cost = len(change.write.data) if isinstance(change.write, Append) else 1
        lane = None if change.session is None else change.session.sid
        return self._batcher.submit(change, cost=max(1, cost), lane=lane)


def _prepare(session: Session, request: AppendRequest, only_repeat: bool) -> Change:
    """A checked append as a write for the store; see `Writing.append`."""
    settings = session.settings
    data = to_bytes(request.embeddings, settings.dtype)
    write = Append(
        session.sid,
        len(request.embeddings),
        data,
        request.payloads,
        request.episode,
        NO_LENGTH if only_repeat else request.if_length,  # a store looks for the key before it compares lengths
        request.idempotency_key,
        _digest(data, request) if request.idempotency_key is not None else b"",
        evict_chunk=settings.chunk_size if settings.evicts else None,
    )
    return Change(write, session)


def _digest(data: bytes, request: AppendRequest) -> bytes:
    """What must be the same when an idempotency key comes again."""
    digest = hashlib.sha256(data)
    digest.update(repr((request.payloads, request.episode, request.if_length)).encode())
    return digest.digest()


def _failure(error: StoreError) -> HTMError:
    """What the store could not do."""
    return DiskFull(str(error)) if isinstance(error, StoreFull) else Unhealthy(f"the store failed: {error}")


def _refusal(error: Refused, session: Session, write: Write) -> HTMError:
    """What the store refused of an append."""
    assert isinstance(write, Append)
    if isinstance(error, NoSuchSession):
        return SessionNotFound(f"there is no session {session.id!r}")
    if isinstance(error, WrongLength):
        found = f"if_length is {write.if_length}, the session's length is {error.length}"
        return LengthConflict(found, length=error.length)
    if isinstance(error, KeyReused):
        return IdempotencyMismatch(str(error))
    assert isinstance(error, SessionFull), error
    if session.settings.evicts:
        return InvalidArgument(
            f"the append of {write.num_tokens} tokens would have to evict itself: session {session.id!r} has "
            f"max_tokens {error.max_tokens}, so {session.settings.max_append} tokens always fit"
        )
    return InvalidArgument(
        f"the append would make session {session.id!r} longer than its max_tokens {error.max_tokens}; "
        f"its length is {error.length}",
        length=error.length,
    )
