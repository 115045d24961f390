"""The way of an append on the event loop, from its checked request to its answer, when it is on disk and visible.

What the store refuses is told in the domain's words. Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import orjson

from htm_service.dtypes import to_bytes
from htm_service.errors import (
    HTMError,
    IdempotencyMismatch,
    InvalidArgument,
    LengthConflict,
    QuotaExceeded,
    SessionNotFound,
)
from htm_service.records import AppendRequest, AppendResult, Event, Timing
from htm_service.sessions.feed import Feed
from htm_service.sessions.session import Session
from htm_service.writes.committer import Committer
from storage import base
from storage.base import Append, Appended, KeyReused, NoSuchSession, Refused, SessionFull, WrongLength

LARGE_BYTES = 256 << 10
"""Embeddings above this are converted off the event loop."""

NO_LENGTH = -1
"""An `if_length` that no session has."""


class Appends:
    """See the head of this module."""

    def __init__(self, committer: Committer, feed: Feed, clock: Callable[[], float]) -> None:
        self._committer = committer
        self._feed = feed
        self._clock = clock

    async def append(self, session: Session, request: AppendRequest, *, only_repeat: bool = False) -> AppendResult:
        """Write tokens; with `only_repeat`, raises LengthConflict instead when this append was not made before."""
        started = time.monotonic()
        if request.embeddings.nbytes > LARGE_BYTES:
            write = await asyncio.to_thread(_prepare, session, request, only_repeat)
        else:
            write = _prepare(session, request, only_repeat)
        try:
            written = await self._committer.write(write, session.resident)
        except Refused as error:
            raise _refusal(error, session, write) from None
        assert isinstance(written, Appended)
        if not written.replayed:
            if written.first_position:
                session.recalls.trim(session.first_chunk)
            session.num_appends += 1
            session.updated_at = self._clock()
        num_chunks = -(-written.length // session.settings.chunk_size)
        result = AppendResult(written.start, written.length, num_chunks, Timing(store_s=time.monotonic() - started))
        if self._feed.is_read and not written.replayed:
            self._feed.tell(Event("append", session.key, session.updated_at, result))
        return result

    async def first_append(self, session: Session, request: AppendRequest) -> AppendResult | None:
        """What an append answered when its idempotency key came first; None when it never came. Writes nothing."""
        if request.idempotency_key is None:
            return None
        try:
            return await self.append(session, request, only_repeat=True)
        except LengthConflict:
            return None


def _prepare(session: Session, request: AppendRequest, only_repeat: bool) -> Append:
    """A checked append as a write for the store; see `Appends.append`."""
    settings = session.settings
    data = to_bytes(request.embeddings, settings.dtype)
    return Append(
        session.sid,
        len(request.embeddings),
        data,
        request.payloads,
        request.episode,
        NO_LENGTH if only_repeat else request.if_length,  # a store looks for the key before it compares lengths
        request.idempotency_key,
        _digest(data, request) if request.idempotency_key is not None else b"",
        trim_chunk=settings.chunk_size if settings.trims else None,
    )


def _digest(data: bytes, request: AppendRequest) -> bytes:
    """What must mean the same when an idempotency key comes again: payloads whatever the order of their keys."""
    payloads = [None if body is None else _sorted(body) for body in request.payloads or ()]
    said = payloads if any(body is not None for body in payloads) else None
    digest = hashlib.sha256(data)
    digest.update(repr((said, request.episode, request.if_length)).encode())
    return digest.digest()


def _sorted(body: bytes) -> bytes:
    return orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)


def _refusal(error: Refused, session: Session, write: Append) -> HTMError:
    """What the store refused of an append."""
    if isinstance(error, NoSuchSession):
        return SessionNotFound(f"there is no session {session.id!r}")
    if isinstance(error, WrongLength):
        found = f"if_length is {write.if_length}, the session's length is {error.length}"
        return LengthConflict(found, length=error.length)
    if isinstance(error, KeyReused):
        return IdempotencyMismatch(str(error))
    if isinstance(error, base.QuotaExceeded):
        return QuotaExceeded(str(error))
    assert isinstance(error, SessionFull), error
    if session.settings.trims:
        return InvalidArgument(
            f"the append of {write.num_tokens} tokens would have to trim itself: session {session.id!r} has "
            f"max_tokens {error.max_tokens}, so {session.settings.max_append} tokens always fit"
        )
    return InvalidArgument(
        f"the append would make session {session.id!r} longer than its max_tokens {error.max_tokens}; "
        f"its length is {error.length}",
        length=error.length,
    )
