"""The way of a truncation on the event loop: the store forgets, then the device, then what was recalled of it here.

Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

from collections.abc import Callable

from htm_service.errors import LengthConflict, SessionNotFound
from htm_service.records import Event, TruncateResult
from htm_service.sessions.directory import Directory, wrong_cut
from htm_service.sessions.feed import Feed
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.session import Session
from htm_service.writes.committer import Committer
from storage.base import NoSuchSession, SessionRow, Truncate, WrongLength


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

    async def truncate(self, session: Session, length: int, if_length: int | None) -> TruncateResult:
        """Forget the tokens from position `length` on. Raises SessionNotFound, LengthConflict, InvalidArgument."""
        chunk_size = session.settings.chunk_size
        async with self._directory.lock(session.key):
            try:
                row = await self._committer.write(
                    Truncate(session.sid, length, chunk_size, if_length), session.resident
                )
            except NoSuchSession:
                raise SessionNotFound(f"there is no session {session.id!r}") from None
            except WrongLength as error:
                if if_length not in (None, error.length):
                    found = f"if_length is {if_length}, the session's length is {error.length}"
                    raise LengthConflict(found, length=error.length) from None
                raise wrong_cut(session, length, error) from None
            assert isinstance(row, SessionRow)
            self._payloads.forget(session.sid)
            session.recalls.truncate(length, chunk_size)
            session.num_stored_keys = min(session.num_stored_keys, length // chunk_size)
            session.damage = None  # it may be gone; else it is met again
            session.updated_at = self._clock()
        result = TruncateResult(length, -(-length // chunk_size))
        if self._feed.is_read:
            self._feed.tell(Event("truncate", session.key, session.updated_at, result))
        return result
