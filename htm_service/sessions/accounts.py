"""The accounts of attends, made once those are answered, of several batches together.

    an attend is answered -> waits here -> its account goes into its session's ring, and to whoever reads along

One that is made alone takes four times as long, for it comes to memory and code that are in no cache; and the answers
of the batch would wait for it. Whoever looks at a ring has what waits put into it first.
Touched on the event loop only.
Does not know how attention is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from htm_service.records import AttendRequest, AttendResult, Event
from htm_service.sessions.feed import Feed
from htm_service.sessions.recalls import RecallLog, account
from htm_service.sessions.session import Session

MADE_TOGETHER = 128
"""Accounts: they hold up the event loop for 0.3 ms."""
WAIT_S = 0.1
"""For how long an account waits for others at most."""
LOOK_EVERY_S = 1.0
"""How often it is looked at what all accounts take."""
KEPT_SHARE = 0.75
"""Of what they may take, where it was too much, so that not all sessions are looked at every time."""
Answered = tuple[Session, AttendRequest, AttendResult, str, float, bool]
"""With which model, when, and whether the account is kept."""


class Accounts:
    """See the head of this module. Of a session the last `max_recalls` are kept; with none, only readers are told."""

    def __init__(self, max_recalls: int, max_bytes: int, feed: Feed) -> None:
        self.max_recalls = max_recalls
        """Of a session, of those that are made from now on."""
        self._max_bytes = max_bytes
        """Of all sessions' accounts together."""
        self._new_bytes = 0
        """By which they have grown since all of them were counted."""
        self._feed = feed
        feed.catch_up = self.settle
        self._waiting: list[Answered] = []

    def log(self, first_chunk: int) -> RecallLog:
        """A ring for a session whose chunks begin with this one."""
        return RecallLog(self.max_recalls, first_chunk, self.settle)

    def add(self, session: Session, request: AttendRequest, result: AttendResult, model: str, now: float) -> None:
        """Account for an attend that was answered, without payloads, with the model of this name."""
        is_kept = bool(self.max_recalls) and result.num_truncated == session.resident.extent.num_truncated
        if not (is_kept or self._feed.is_read):
            return
        if not self._waiting:
            asyncio.get_running_loop().call_later(WAIT_S, self.settle)
        self._waiting.append((session, request, result, model, now, is_kept))
        if len(self._waiting) == MADE_TOGETHER:
            asyncio.get_running_loop().call_soon(self.settle)  # after the answers of the batch that this is of

    def settle(self) -> None:
        """Have everything accounted for that was answered so far."""
        waiting, self._waiting = self._waiting, []
        for session, request, result, model, now, is_kept in waiting:
            recall = account(request, result, model, now)
            if is_kept:
                before = session.recalls.num_bytes
                session.recalls.add(recall, request, result)
                self._new_bytes += session.recalls.num_bytes - before
            if self._feed.is_read:
                self._feed.tell(Event("recall", session.key, now, recall))

    async def run(self, sessions: Callable[[], Collection[Session]]) -> None:
        """Look after the memory of the accounts of `sessions`, those used longest ago first, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._new_bytes > self._max_bytes * (1 - KEPT_SHARE):
                self.trim(sessions())

    def trim(self, sessions: Collection[Session]) -> None:
        """Forget the accounts of the first sessions, where all together take more than they may."""
        self._new_bytes = 0
        num_bytes = sum(session.recalls.num_bytes for session in sessions)
        if num_bytes <= self._max_bytes:
            return
        for session in sessions:
            if num_bytes <= self._max_bytes * KEPT_SHARE:
                break
            num_bytes -= session.recalls.num_bytes
            session.recalls.forget()
