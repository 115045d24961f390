"""Payloads of tokens for answers: from the cache, where they are, without waiting; else from the store.

What is missing there waits for one thread, which reads for all that wait at once. Runs on the event loop, but for
`run`. Does not know requests, or what payloads say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from htm_service.errors import HTMError, InvalidArgument
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.session import Session
from htm_service.store_errors import still_there, unreadable
from htm_service.threads.batcher import Batcher, Outcome, Ticket
from storage.base import SessionKey, Store, StoreError, TooManyBytes

Texts = Mapping[int, bytes]
"""Payloads by position, where there are any."""


class Wanted(NamedTuple):
    """Positions of a session whose payloads somebody waits for, no more than `max_bytes` of them."""

    key: SessionKey
    sid: int
    positions: list[int]
    max_bytes: int


class Payloads:
    """See the head of this module. `queue` is the thread's, which is to call `run`."""

    def __init__(self, store: Store, queue: Batcher[Wanted, Texts], cache: PayloadCache, max_bytes: int) -> None:
        self.queue = queue
        self.cache = cache
        self._store = store
        self._max_bytes = max_bytes

    async def of(self, session: Session, positions: Sequence[int], num_truncated: int) -> Texts:
        """Those of tokens that were there when the session had been truncated so often; of those trimmed meanwhile
        maybe none, and where it was truncated since, of others.

        Raises SessionNotFound, SessionDamaged, and InvalidArgument when they have more bytes than an answer may hold.
        """
        most = self._max_bytes
        found, missing = self.cache.find(session.sid, num_truncated, positions)
        num_bytes = sum(map(len, found.values()))
        if missing and num_bytes <= most:
            before = self.cache.num_forgotten
            try:
                texts = await self.queue.submit(Wanted(session.key, session.sid, missing, most - num_bytes))
            except TooManyBytes:
                num_bytes = most + 1
            else:
                if self.cache.num_forgotten == before and session.resident.num_begun == num_truncated:
                    self.cache.add(session.sid, num_truncated, missing, texts)
                return {**found, **texts}
        if num_bytes > most:
            raise InvalidArgument(
                f"the payloads of {len(positions)} tokens have more bytes than one answer may hold, which is "
                f"{self._max_bytes}: ask fewer queries at once, or for fewer tokens"
            )
        return found

    def totals(self) -> dict[str, int]:
        """What the cache holds, and of how many tokens it knew, or did not, since the start."""
        return {
            "payload_cache_bytes": self.cache.num_bytes,
            "payload_cache_hits": self.cache.num_hits,
            "payload_cache_misses": self.cache.num_misses,
            "waiting_payloads": self.queue.num_waiting,
        }

    def run(self, tickets: Sequence[Ticket[Wanted, Texts]]) -> list[Outcome[Texts]]:
        """Read what is wanted, all of it in one view of the store (the thread)."""
        asked = [(ticket.item.sid, ticket.item.positions, ticket.item.max_bytes) for ticket in tickets]
        try:
            found = self._store.read_payloads_each(asked)
        except StoreError as error:
            return [unreadable(ticket.item.key.id, error) for ticket in tickets]
        return [self._checked(ticket.item, texts) for ticket, texts in zip(tickets, found, strict=True)]

    def _checked(self, wanted: Wanted, texts: Texts | TooManyBytes) -> Texts | Exception:
        if isinstance(texts, TooManyBytes) or len(texts) == len(wanted.positions):
            return texts
        try:
            still_there(self._store, wanted.key, wanted.sid)  # a payload that is not there does not say why
        except StoreError as error:
            return unreadable(wanted.key.id, error)
        except HTMError as error:
            return error
        return texts
