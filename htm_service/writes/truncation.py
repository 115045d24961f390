"""The way of a truncation on the event loop: the store forgets, then the device, then what was recalled of it here.

Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from htm_service.errors import LengthConflict, SessionNotFound
from htm_service.records import Event, Timing, TruncateRequest, TruncateResult
from htm_service.sessions.directory import Directory, wrong_cut
from htm_service.sessions.feed import Feed
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.session import Session
from htm_service.writes.committer import Change, Committer, Written
from storage.base import NoSuchSession, Truncate, WrongLength


class Truncation:
    """See the head of this module."""

    def __init__(
        self,
        directory: Directory,
        committer: Committer,
        payloads: PayloadCache,
        feed: Feed,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._payloads = payloads
        self._committer = committer
        self._feed = feed
        self._clock = clock

    async def truncate(self, session: Session, request: TruncateRequest) -> TruncateResult:
        """Forget what came after a length. Raises SessionNotFound, LengthConflict, InvalidArgument."""
        (outcome,) = await self.truncate_all([(session, request)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def truncate_all(self, wanted: Sequence[tuple[Session, TruncateRequest]]) -> list[TruncateResult | Exception]:
        """The same of several sessions in one group of writes, in order; one that fails takes no other along.

        It goes on where the caller goes: else what is gone on disk would still be told here.
        """
        return await asyncio.shield(self._truncate_all(wanted))

    async def _truncate_all(
        self, wanted: Sequence[tuple[Session, TruncateRequest]]
    ) -> list[TruncateResult | Exception]:
        started = time.monotonic()
        changes = [
            Change(Truncate(session.sid, length, session.settings.chunk_size, if_length), session.resident)
            for session, (length, if_length) in wanted
        ]
        async with contextlib.AsyncExitStack() as held:
            # In one order, whatever the request's, so that no two wait for each other.
            for key in sorted({session.key for session, _ in wanted}):
                await held.enter_async_context(self._directory.lock(key))
            outcomes = await self._committer.write_all(changes)
            return [self._done(*one, outcome, started) for one, outcome in zip(wanted, outcomes, strict=True)]

    def _done(
        self, session: Session, request: TruncateRequest, outcome: Written | Exception, started: float
    ) -> TruncateResult | Exception:
        """What is answered for one; what was recalled of the tokens that are gone is forgotten here too."""
        if isinstance(outcome, Exception):
            return _refusal(outcome, session, request)
        length, chunk_size = request.length, session.settings.chunk_size
        self._payloads.forget(session.sid)
        session.recalls.truncate(length, chunk_size)
        session.num_stored_keys = min(session.num_stored_keys, length // chunk_size)
        session.damage = None  # it may be gone; else it is met again
        session.updated_at = self._clock()
        result = TruncateResult(length, -(-length // chunk_size), Timing(store_s=time.monotonic() - started))
        if self._feed.is_read:
            self._feed.tell(Event("truncate", session.key, session.updated_at, result))
        return result


def _refusal(error: Exception, session: Session, request: TruncateRequest) -> Exception:
    """What the store refused of a truncation."""
    if isinstance(error, NoSuchSession):
        return SessionNotFound(f"there is no session {session.id!r}")
    if isinstance(error, WrongLength):
        if request.if_length not in (None, error.length):
            found = f"if_length is {request.if_length}, the session's length is {error.length}"
            return LengthConflict(found, length=error.length)
        return wrong_cut(session, request.length, error)
    return error
