"""The way of an append on the event loop, from its checked request to its answer, when it is on disk and visible.

What the store refuses is told in the domain's words. Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence

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
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.session import Session
from htm_service.writes.committer import Change, Committer, Written
from storage import base
from storage.base import Append, Appended, KeyReused, NoSuchSession, Refused, SessionFull, WrongLength

LARGE_BYTES = 256 << 10
"""Embeddings above this are converted off the event loop."""

FEW_BYTES = 16 << 10
"""So many are hashed by pieces of HASHED_AT_ONCE: for more at once, hashlib lets another thread have the interpreter,
and to get it back takes longer than all of it.
"""
HASHED_AT_ONCE = 2_047

NO_LENGTH = -1
"""An `if_length` that no session has."""

Prepared = Append | HTMError | None
"""A write, why there is none, or None where there is nothing to write."""


class Appends:
    """See the head of this module."""

    def __init__(self, committer: Committer, payloads: PayloadCache, feed: Feed, clock: Callable[[], float]) -> None:
        self._committer = committer
        self._payloads = payloads
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
        return self._appended(session, write, written, started)

    async def append_all(self, wanted: Sequence[tuple[Session, AppendRequest]]) -> list[AppendResult | Exception]:
        """Write the tokens of several sessions, none of them twice, in one group; one that fails takes no other along.

        Where there are no tokens, nothing is written.
        """
        return await self.write_all(wanted, await self.prepare_all(wanted))

    async def prepare_all(self, wanted: Sequence[tuple[Session, AppendRequest]]) -> list[Prepared]:
        """What is to be written of each, which takes a moment; off the event loop where it is much."""
        if sum(request.embeddings.nbytes for _, request in wanted) > LARGE_BYTES:
            return await asyncio.to_thread(_prepare_all, wanted)
        return _prepare_all(wanted)

    async def write_all(
        self, wanted: Sequence[tuple[Session, AppendRequest]], prepared: Sequence[Prepared]
    ) -> list[AppendResult | Exception]:
        """Write what was prepared."""
        started = time.monotonic()
        writes = [(place, write) for place, write in enumerate(prepared) if isinstance(write, Append)]
        changes = [Change(write, wanted[place][0].resident) for place, write in writes]
        all_written = await self._committer.write_all(changes) if changes else []
        outcomes: dict[int, AppendResult | Exception] = {}
        for (place, write), written in zip(writes, all_written, strict=True):
            session = wanted[place][0]
            if isinstance(written, Refused):
                outcomes[place] = _refusal(written, session, write)
            elif isinstance(written, Exception):
                outcomes[place] = written
            else:
                outcomes[place] = self._appended(session, write, written, started)
        for place, left in enumerate(prepared):
            if left is None:
                session, request = wanted[place]
                outcomes[place] = _nothing(session, request.if_length)
            elif isinstance(left, HTMError):
                outcomes[place] = left
        return [outcomes[place] for place in range(len(wanted))]

    def _appended(self, session: Session, write: Append, written: Written, started: float) -> AppendResult:
        """What an append that is on disk is answered; it is counted and told."""
        assert isinstance(written, Appended)
        if not written.replayed:
            if written.first_position:
                session.recalls.trim(session.first_chunk)
                self._payloads.trim(session.sid, written.first_position)
            is_known = not (session.resident.is_deleted or session.resident.num_begun)  # else they may not be there now
            if write.payloads is not None and is_known:
                self._payloads.append(session.sid, written.start, write.payloads)
            session.num_appends += 1
            session.updated_at = self._clock()
        num_chunks = -(-written.length // session.settings.chunk_size)
        timing = Timing(store_s=time.monotonic() - started)
        result = AppendResult(written.start, written.length, num_chunks, timing, written.replayed)
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


def only_repeat(prepared: Prepared) -> Prepared:
    """The write that answers what it answered before, and otherwise is refused as WrongLength."""
    return prepared._replace(if_length=NO_LENGTH) if isinstance(prepared, Append) else prepared


def _prepare_all(wanted: Sequence[tuple[Session, AppendRequest]]) -> list[Prepared]:
    prepared: list[Prepared] = []
    for session, request in wanted:
        try:
            prepared.append(_prepare(session, request, False) if len(request.embeddings) else None)
        except HTMError as error:
            prepared.append(error)
    return prepared


def _nothing(session: Session, if_length: int | None) -> AppendResult | LengthConflict:
    """What is answered where there is nothing to append."""
    length = session.length
    if if_length not in (None, length):
        return _other_length(if_length, length)
    return AppendResult(length, length, session.num_chunks)


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
    digest = hashlib.sha256()
    at_once = HASHED_AT_ONCE if len(data) <= FEW_BYTES else len(data)
    for first in range(0, len(data), at_once):
        digest.update(data[first : first + at_once])
    digest.update(repr((said, request.episode, request.if_length)).encode())
    return digest.digest()


def _sorted(body: bytes) -> bytes:
    return orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)


def _refusal(error: Refused, session: Session, write: Append) -> HTMError:
    """What the store refused of an append."""
    if isinstance(error, NoSuchSession):
        return SessionNotFound(f"there is no session {session.id!r}")
    if isinstance(error, WrongLength):
        return _other_length(write.if_length, error.length)
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


def _other_length(if_length: int | None, length: int) -> LengthConflict:
    return LengthConflict(f"if_length is {if_length}, the session's length is {length}", length=length)
