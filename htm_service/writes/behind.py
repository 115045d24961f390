"""Appends acknowledged with `durability: memory`: taken now, on disk with the next group.

What must be known of such an append before it is written is where it begins. That is known while every append of
its session that went before is either answered, or was taken here itself: `session.tip`. It goes to the store
on the condition that the session still has that length, so nothing else than what was acknowledged is written,
and what comes after a failure fails as well: that is one loss, which is told once. Whoever reads the session waits
for what it took (`settle`), so what is seen is on disk here as everywhere. Everything else waits for its group, as a
durable append does.
Runs on the event loop. Does not know SQL, the device or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from htm_service.errors import DeadlineExceeded, DiskFull, HTMError, Unhealthy
from htm_service.sessions.session import Session
from htm_service.writes.committer import Change, Written
from storage.base import Append, Appended, NoSuchSession, StoreFull

MAX_BYTES = 64 << 20
"""Tokens that may wait for the disk after they were acknowledged, of all sessions together; more appends wait."""


class WriteBehind:
    """See the head of this module. `submit` hands a change to the store's thread; it may raise Unavailable."""

    def __init__(self, submit: Callable[[Change], asyncio.Future[Written]]) -> None:
        self._submit = submit
        self._num_bytes = 0

    def take(self, session: Session, change: Change) -> Appended | None:
        """Take an append of `session` and acknowledge it; None when it must be waited for, or will be refused."""
        write, start = change.write, session.tip
        assert isinstance(write, Append)
        if start is None or write.idempotency_key is not None or write.if_length not in (None, start):
            return None
        if self._num_bytes + len(write.data) > MAX_BYTES or not session.settings.has_room(start, write.num_tokens):
            return None
        future = self._submit(change._replace(write=write._replace(if_length=start)))
        session.tip = start + write.num_tokens
        session.unwritten[future] = start
        self._num_bytes += len(write.data)
        future.add_done_callback(partial(self._end, session, write, start))
        return Appended(start, session.tip)

    async def settle(self, session: Session, timeout_s: float) -> None:
        """Wait until what was taken is visible, or lost. Raises DeadlineExceeded."""
        if session.unwritten:
            _, late = await asyncio.wait(session.unwritten, timeout=timeout_s)
            if late:
                raise DeadlineExceeded(f"session {session.id!r} was not written within {timeout_s * 1e3:.0f} ms")

    def _end(self, session: Session, write: Append, start: int, future: asyncio.Future[Written]) -> None:
        del session.unwritten[future]
        is_told = future in session.doomed
        session.doomed.discard(future)
        self._num_bytes -= len(write.data)
        error = future.exception()
        if error is None or isinstance(error, NoSuchSession):  # deleted meanwhile: nothing of it is missed
            return
        session.tip = None
        session.num_lost_tokens += write.num_tokens
        session.doomed.update(later for later, begin in session.unwritten.items() if begin > start)
        if session.loss is None and not is_told:
            kind: type[HTMError] = DiskFull if isinstance(error, StoreFull) else Unhealthy
            session.loss = kind(
                f"session {session.id!r}: the tokens from position {start} on, acknowledged with durability 'memory', "
                f"could not be written and are lost: {error}"
            )
            logging.getLogger(__name__).error("%s", session.loss)


def check(session: Session) -> None:
    """Raise what went wrong with appends that were acknowledged, once: the next append or read tells it."""
    loss, session.loss = session.loss, None
    if loss is not None:
        raise loss
