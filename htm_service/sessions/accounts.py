"""The accounts of attends, made once those are answered, of all together that one batch answered.

    an attend is answered -> waits here -> its account goes into its session's ring, and to whoever reads along

One that is made alone takes four times as long, for it comes to memory and code that are in no cache; and the answers
of the batch would wait for it. Whoever looks at a ring has what waits put into it first.
Touched on the event loop only.
Does not know how attention is computed.
"""

from __future__ import annotations

import asyncio

from htm_service.records import AttendRequest, AttendResult, Event
from htm_service.sessions.feed import Feed
from htm_service.sessions.recalls import RecallLog, account
from htm_service.sessions.session import Session

Answered = tuple[Session, AttendRequest, AttendResult, str, float, bool]
"""With which model, when, and whether the account is kept."""


class Accounts:
    """See the head of this module. Of a session the last `max_recalls` are kept; with none, only readers are told."""

    def __init__(self, max_recalls: int, feed: Feed) -> None:
        self._max_recalls = max_recalls
        self._feed = feed
        self._waiting: list[Answered] = []

    def log(self, first_chunk: int) -> RecallLog:
        """A ring for a session whose chunks begin with this one."""
        return RecallLog(self._max_recalls, first_chunk, self.settle)

    def add(self, session: Session, request: AttendRequest, result: AttendResult, model: str, now: float) -> None:
        """Account for an attend that was answered, without payloads, with the model of this name."""
        is_kept = bool(self._max_recalls) and result.num_truncated == session.resident.extent.num_truncated
        if not (is_kept or self._feed.is_read):
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.settle)  # after the answers of the batch that this is of
        self._waiting.append((session, request, result, model, now, is_kept))

    def settle(self) -> None:
        """Have everything accounted for that was answered so far."""
        waiting, self._waiting = self._waiting, []
        for session, request, result, model, now, is_kept in waiting:
            recall = account(request, result, model, now)
            if is_kept:
                session.recalls.add(recall, request, result)
            if self._feed.is_read:
                self._feed.tell(Event("recall", session.key, now, recall))
