"""The sessions by their keys: found in the store on first use, created, changed, deleted, expired.

Writes go through the one writer, so the store decides who was first. Runs on the event loop.
Does not know tokens, attention or what is on the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from htm_service.cursors import decode_cursor, encode_cursor
from htm_service.errors import (
    InvalidArgument,
    QuotaExceeded,
    SessionConflict,
    SessionDamaged,
    SessionExpired,
    SessionNotFound,
    Unavailable,
    Unhealthy,
    clipped,
)
from htm_service.memory.resident import Extent, Forked, Resident
from htm_service.records import Change, Event, SessionChange, SessionInfo, SessionPage
from htm_service.session_settings import SessionSettings, wrong_with
from htm_service.sessions import validation
from htm_service.sessions.accounts import Accounts
from htm_service.sessions.feed import Feed
from htm_service.sessions.payload_cache import PayloadCache
from htm_service.sessions.session import Session
from storage import base
from storage.base import (
    FIRST_KEY,
    CreateSession,
    DeleteSession,
    Fork,
    NoSuchSession,
    Publish,
    SessionExists,
    SessionKey,
    SessionRow,
    Store,
    StoreError,
    UpdateSession,
    Write,
    WrongLength,
)

EXPIRED_REMEMBERED = 10_000
"""Keys of expired sessions, the last ones, that are answered `session_expired` rather than `session_not_found`."""
SCAN_LIMIT = 200
"""Sessions that are looked at together for expiry, and deleted together."""
LOOK_LIMIT = 5_000
"""Sessions that a listing by last use looks at before others get their turn."""
BY_USE = re.compile(r"[0-9]{1,15}|>[A-Za-z0-9._~-]{0,128}")
"""A cursor by last use: how many of those in use came before, or `>` and the last id of the others."""


class Directory:
    """See the head of this module. `write` makes one write, of a session on the device, durable, or raises why not."""

    def __init__(
        self,
        store: Store,
        write: Callable[[Write, Resident | None], Awaitable[object]],
        clock: Callable[[], float],
        accounts: Accounts,
        feed: Feed,
        payloads: PayloadCache,
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._feed = feed
        self._write = write
        self._clock = clock
        self._accounts = accounts
        self._started_at = clock()
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        """Those that were used since the start, the last used last."""
        self._locks: WeakValueDictionary[SessionKey, asyncio.Lock] = WeakValueDictionary()
        self._expired: OrderedDict[SessionKey, None] = OrderedDict()
        self.num_expired = 0

    def sessions(self) -> Collection[Session]:
        """Those that were used since the start, the last used last."""
        return self._sessions.values()

    def totals(self) -> dict[str, int]:
        """What became of sessions since the start."""
        num_damaged = sum(session.damage is not None for session in self._sessions.values())
        return {"expired_sessions": self.num_expired, "damaged_sessions": num_damaged}

    def known(self, key: SessionKey) -> Session | None:
        """The session, which counts as used now, when nothing has to be waited for; None: ask `get`."""
        session, now = self._sessions.get(key), self._clock()
        if session is None or session.is_expired(now):
            return None
        session.last_used_at = now
        self._sessions.move_to_end(key)
        return session

    async def get(self, key: SessionKey) -> Session:
        """The session, which counts as used now. Raises SessionNotFound or SessionExpired."""
        session = self._sessions.get(key) or await self._find(key)
        now = self._clock()
        if session is not None and session.is_expired(now):
            with contextlib.suppress(Unavailable):  # that it could not be deleted yet changes nothing for the caller
                await asyncio.shield(self._expire(session))  # who asked may go: half of it would leave its pages behind
            session = self._sessions.get(key)  # used meanwhile, maybe
            session = None if session is not None and session.is_expired(now) else session
        if session is None:
            if key in self._expired:
                raise SessionExpired(f"session {key.id!r} was idle for longer than its ttl_s and is gone")
            raise SessionNotFound(f"there is no session {key.id!r}")
        session.last_used_at = now
        if key in self._sessions:  # not deleted while this waited
            self._sessions.move_to_end(key)
        return session

    async def create(self, key: SessionKey, settings: SessionSettings) -> tuple[Session, bool]:
        """The new session, or the one that is there (False). Its settings are the caller's to compare."""
        while True:
            if (found := await self._in_the_way(key)) is not None:
                return found, False
            async with self.lock(key):
                try:
                    return await self._make(CreateSession(self._row(key, settings))), True
                except SessionExists:  # by a create that was faster: look again
                    continue

    async def publish(self, key: SessionKey, sid: int, settings: SessionSettings) -> Session:
        """The session that was staged as `sid`, by its own name from now on. Raises SessionConflict, QuotaExceeded."""
        async with self.lock(key):
            try:
                return await self._make(Publish(sid, self._row(key, settings)))
            except SessionExists:
                raise taken(key) from None

    async def check_free(self, key: SessionKey) -> None:
        """Raise SessionConflict where there is a session of this name."""
        try:
            await self.get(key)
        except (SessionNotFound, SessionExpired):
            return
        raise taken(key)

    async def _make(self, write: CreateSession | Publish) -> Session:
        """The session that is new with a write. Raises QuotaExceeded, SessionExists."""
        try:
            written = await self._write(write, None)
        except base.QuotaExceeded as error:
            raise QuotaExceeded(str(error)) from None
        assert isinstance(written, SessionRow)
        self._expired.pop(written.key, None)
        session = self._add(written)
        self._tell(session.key, "created")
        return session

    async def fork(
        self, session: Session, key: SessionKey, length: int | None, labels: Mapping[str, str] | None
    ) -> Session:
        """A new session with the first tokens of one, all when `length` is None, and its settings, labels maybe others.

        Raises SessionConflict, InvalidArgument, SessionNotFound, QuotaExceeded.
        """
        settings = session.settings if labels is None else replace(session.settings, labels=labels)
        while True:
            if await self._in_the_way(key) is not None:
                raise SessionConflict(f"session {key.id!r} exists already, a fork is a new one")
            write = Fork(session.sid, self._row(key, settings), settings.chunk_size, length)
            async with self.lock(key):
                try:
                    forked = await self._write(write, session.resident)
                except base.QuotaExceeded as error:
                    raise QuotaExceeded(str(error)) from None
                except NoSuchSession:
                    raise SessionNotFound(f"there is no session {session.id!r}") from None
                except WrongLength as error:
                    raise wrong_cut(session, length or 0, error) from None
                except SessionExists:
                    continue
                assert isinstance(forked, Forked)
                self._expired.pop(key, None)
                child = self._add(forked.row, forked.resident)
                self._tell(key, "forked")
                return child

    async def _in_the_way(self, key: SessionKey) -> Session | None:
        """The session of this name, which is to be made. Raises where one that expired cannot be deleted."""
        try:
            return await self.get(key)
        except SessionExpired:  # where it could not be deleted, say why: its id is not free before
            if (expired := self._sessions.get(key)) is not None:
                await self._expire(expired)
        except SessionNotFound:
            pass
        return None

    def _row(self, key: SessionKey, settings: SessionSettings) -> SessionRow:
        """What the store is given of a new session."""
        now = self._clock()
        return SessionRow(
            key.id,
            settings.stored(),
            now,
            max_tokens=settings.max_tokens,
            updated_at=now,
            namespace=key.namespace,
        )

    async def update(self, session: Session, change: SessionChange) -> None:
        """Change labels, ttl_s or model, durably."""
        async with self.lock(session.key):
            settings = session.settings
            if change.labels is not None:
                settings = replace(settings, labels=change.labels)
            if change.model is not None:
                settings = replace(settings, model=change.model)
            if change.ttl_s is not None or change.clear_ttl:
                settings = replace(settings, ttl_s=change.ttl_s)
            try:
                await self._write(UpdateSession(session.sid, settings.stored()), session.resident)
            except NoSuchSession:
                raise SessionNotFound(f"there is no session {session.id!r}") from None
            session.settings = settings
        self._tell(session.key, "updated")

    async def delete(self, session: Session) -> None:
        """Delete durably."""
        async with self.lock(session.key):
            await self._delete(session)

    async def _delete(self, session: Session) -> None:
        # Out of the table first: whoever asks meanwhile waits for the lock and then asks the store.
        self._sessions.pop(session.key, None)
        try:
            await self._write(DeleteSession(session.sid), session.resident)
        except NoSuchSession:
            raise SessionNotFound(f"there is no session {session.id!r}") from None
        except Exception:
            self._sessions[session.key] = session
            raise
        self._payloads.forget(session.sid)
        self._accounts.settle()  # nothing is told of it afterwards
        self._tell(session.key, "deleted")

    async def delete_all(
        self, namespace: str, prefix: str, labels: Mapping[str, str] | None
    ) -> AsyncIterator[list[int]]:
        """Delete the sessions of a namespace with this prefix and these labels, page by page; the `sid`s of each."""

        async def delete(row: SessionRow) -> bool:
            async with self.lock(row.key):
                session = self._sessions.get(row.key) or self._of(row)
                if session is None or session.sid != row.sid:  # deleted meanwhile, and maybe made anew
                    return False
                try:
                    await self._delete(session)
                except SessionNotFound:
                    return False
                return True

        which = {"namespace": namespace, "prefix": prefix, "labels": labels, "limit": SCAN_LIMIT}
        after: SessionKey | None = SessionKey(namespace, "")
        while after is not None:
            rows = await self._list(**which, after=after)
            is_deleted = await asyncio.gather(*map(delete, rows))  # one transaction, more or less
            yield [row.sid for row, done in zip(rows, is_deleted, strict=True) if done]
            after = rows[-1].key if len(rows) == SCAN_LIMIT else None

    async def delete_unreadable(self, key: SessionKey) -> int:
        """Delete durably a session whose settings cannot be read, so that it never came in here; its `sid`."""
        async with self.lock(key):
            row = await self._look_up(key)
            if row is None or wrong_with(row.settings) is None:  # deleted meanwhile, and maybe made anew
                raise SessionNotFound(f"there is no session {key.id!r}")
            await self._write(DeleteSession(row.sid), None)
            self._payloads.forget(row.sid)
            self._tell(key, "deleted")
            return row.sid

    async def keys_of(
        self, namespace: str, prefix: str, labels: Mapping[str, str] | None, most: int
    ) -> list[SessionKey]:
        """Those of a namespace with this prefix and these labels that are not expired, one more than `most` at most."""
        keys: list[SessionKey] = []
        after: SessionKey | None = SessionKey(namespace, "")
        while after is not None and len(keys) <= most:
            rows = await self._list(namespace=namespace, prefix=prefix, labels=labels, after=after, limit=SCAN_LIMIT)
            now = self._clock()
            keys += [row.key for row in rows if (of := self._of(row)) is not None and not of.is_expired(now)]
            after = rows[-1].key if len(rows) == SCAN_LIMIT else None
        return keys[: most + 1]

    async def list_page(
        self, namespace: str, prefix: str, labels: Mapping[str, str] | None, cursor: str | None, limit: int
    ) -> SessionPage:
        """One page of a namespace's sessions in the order of their ids."""
        after = SessionKey(namespace, decode_cursor(cursor, validation.ID))
        rows = await self._list(namespace=namespace, prefix=prefix, labels=labels, after=after, limit=limit + 1)
        now = self._clock()
        infos = [info for row in rows[:limit] if (info := self._info(row, now)) is not None]
        return SessionPage(infos, encode_cursor(rows[limit - 1].id) if len(rows) > limit else None)

    async def list_by_use(
        self, namespace: str, prefix: str, labels: Mapping[str, str] | None, cursor: str | None, limit: int
    ) -> SessionPage:
        """One page of a namespace's sessions: those used since the start, last used first; after them the others."""
        key = decode_cursor(cursor, BY_USE) or "0"
        infos: list[SessionInfo] = []
        if not key.startswith(">"):
            infos, place = await self._in_use(namespace, prefix, labels or {}, int(key), limit + 1)
            if len(infos) > limit:
                return SessionPage(infos[:limit], encode_cursor(str(place - 1)))
            key = ">"
        after, now = key[1:], self._clock()
        while True:
            begin = SessionKey(namespace, after)
            rows = await self._list(namespace=namespace, prefix=prefix, labels=labels, after=begin, limit=SCAN_LIMIT)
            for row in rows:
                if row.key not in self._sessions and (info := self._info(row, now)) is not None:
                    if len(infos) == limit:
                        return SessionPage(infos, encode_cursor(f">{after}"))
                    infos.append(info)
                after = row.id
            if len(rows) < SCAN_LIMIT:
                return SessionPage(infos, None)

    async def _in_use(
        self, namespace: str, prefix: str, labels: Mapping[str, str], first: int, limit: int
    ) -> tuple[list[SessionInfo], int]:
        """Of a namespace's sessions in use at most `limit` that match, last used first, from the `first`th of all on;
        and how many were looked at before the next one.
        """
        now, found, place = self._clock(), list[SessionInfo](), first
        for session in list(reversed(self._sessions.values()))[first:]:
            place += 1
            if place % LOOK_LIMIT == 0:
                await asyncio.sleep(0)
            is_named = session.key.namespace == namespace and session.id.startswith(prefix)
            if is_named and labels.items() <= session.settings.labels.items():
                if not session.is_expired(now) and not session.resident.is_deleted:
                    found.append(session.info())
                if len(found) == limit:
                    break
        return found, place

    async def expire(self) -> AsyncIterator[int]:
        """Delete the sessions that are past their ttl_s, a page of sessions at a time; how many of each page."""
        after: SessionKey | None = FIRST_KEY
        while after is not None:
            rows = await self._list(after=after, limit=SCAN_LIMIT)
            mortal = [row for row in rows if row.settings.get("ttl_s") is not None]
            sessions = [session for row in mortal if (session := self._of(row)) is not None]
            expired = [session for session in sessions if session.is_expired(self._clock())]
            await asyncio.gather(*map(self._expire, expired))  # one transaction, more or less
            yield len(expired)
            after = rows[-1].key if len(rows) == SCAN_LIMIT else None

    def _info(self, row: SessionRow, now: float) -> SessionInfo | None:
        session = self._of(row)
        return None if session is None or session.is_expired(now) else session.info()

    def _of(self, row: SessionRow) -> Session | None:
        """The session of a listed row; None where its settings are damaged, as the store leaves out such rows."""
        try:
            return self._sessions.get(row.key) or self._new(row)
        except SessionDamaged:
            return None

    async def _find(self, key: SessionKey) -> Session | None:
        async with self.lock(key):
            if key in self._sessions:
                return self._sessions[key]
            row = await self._look_up(key)
            return None if row is None else self._add(row)

    async def _look_up(self, key: SessionKey) -> SessionRow | None:
        try:
            return await asyncio.to_thread(self._store.get_session, key)
        except StoreError as error:
            raise Unhealthy(f"session {key.id!r} cannot be looked up: {error}") from error

    async def _list(self, **which: Any) -> list[SessionRow]:
        try:
            return await asyncio.to_thread(self._store.list_sessions, **which)
        except StoreError as error:
            raise Unhealthy(f"sessions cannot be listed: {error}") from error

    async def _expire(self, session: Session) -> None:
        """Delete a session that is past its ttl_s, unless it was used or changed while this waited for its lock."""
        async with self.lock(session.key):
            session = self._sessions.get(session.key, session)
            if session.resident.is_deleted or not session.is_expired(self._clock()):
                return
            self._expired[session.key] = None
            while len(self._expired) > EXPIRED_REMEMBERED:
                self._expired.popitem(last=False)
            with contextlib.suppress(SessionNotFound):
                await self._delete(session)
                self.num_expired += 1

    def _tell(self, key: SessionKey, change: Change) -> None:
        if self._feed.is_read:
            self._feed.tell(Event("session", key, self._clock(), change))

    def lock(self, key: SessionKey) -> asyncio.Lock:
        """Held by whoever makes, changes or deletes a session, or cuts it: one at a time."""
        return self._locks.setdefault(key, asyncio.Lock())

    def _add(self, row: SessionRow, resident: Resident | None = None) -> Session:
        session = self._sessions[row.key] = self._new(row, resident)
        return session

    def _new(self, row: SessionRow, resident: Resident | None = None) -> Session:
        settings = SessionSettings.of_row(row)
        return Session(
            resident or Resident(row.key, row.sid, settings, Extent(row.first_position, row.length)),
            settings,
            created_at=row.created_at,
            updated_at=row.updated_at,
            # Reads are not stored: after a restart a session counts as used when the server started. A time that has
            # not come yet is that of a clock which was wrong.
            last_used_at=row.updated_at if self._started_at < row.updated_at <= self._clock() else self._started_at,
            recalls=self._accounts.log(row.first_position // settings.chunk_size),
        )


def taken(key: SessionKey) -> SessionConflict:
    """What is said where a name is not free."""
    return SessionConflict(f"there is a session {key.id!r} already; delete it first, or name this one otherwise")


def wrong_cut(session: Session, length: int, error: WrongLength) -> InvalidArgument:
    """Why a session cannot be cut at a length, which the store refused."""
    if length > error.length:
        return InvalidArgument(f"length is {length}, the length of session {session.id!r} is {error.length}")
    return InvalidArgument(
        f"length is {length}, the tokens of session {session.id!r} before {session.first_position} were trimmed"
    )


def compare(session: Session, wanted: SessionSettings, explicit: frozenset[str]) -> None:
    """Raise SessionConflict unless `session` has the settings `wanted`.

    What PATCH may change (labels, ttl_s, model) counts only when it was named (`explicit`).
    """
    for name in (
        "dim",
        "chunk_size",
        "dtype",
        "open_chunk",
        "max_tokens",
        "on_full",
        "labels",
        "ttl_s",
        "model",
    ):
        if name in {"labels", "ttl_s", "model"} and name not in explicit:
            continue
        has, want = getattr(session.settings, name), getattr(wanted, name)
        if has != want:
            found = f"exists with {name} {clipped(repr(has))}, and {clipped(repr(want))} was asked for"
            raise SessionConflict(f"session {session.id!r} {found}")
