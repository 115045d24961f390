"""Callers' keys: made, found, taken back. In memory, and read from the store again and again.

Another server of the store may take a key back, so what is in memory counts for STALE_S at most: a store that cannot be
read opens nothing. Who brings a key that is not known may wait for one reading more, which all of them share, so that
guesses cost the store nothing. Runs on the event loop. Does not know what a role may do, nor HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import string
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from htm_service.errors import HTMError, InvalidArgument, KeyExists, KeyNotFound, Unhealthy, quoted
from htm_service.memory.resident import Resident
from htm_service.records import ALL_NAMESPACES, Key, KeyWish, Role
from htm_service.sessions import validation
from storage import base
from storage.base import CreateKey, DeleteKey, KeyRow, Store, StoreError, UseKey, Write

REFRESH_S = 0.5
"""How often the store is read, so that a key is refused within a second of being taken back elsewhere."""
STALE_S = 5.0
"""For how long what was read counts, where the store cannot be read."""
UNKNOWN_S = 0.1
"""How often a reading may be asked for by keys that are not known."""
NOTE_S = 10.0
"""How often the times of last use are written down."""
MAX_KEYS = 1_000
"""Of one namespace."""
MAX_EXPIRES_S = 10 * 365 * 86_400

_DIGITS = string.digits + string.ascii_letters
_NUM_DIGITS = 43
"""Of 256 bits in base 62."""


class Keys:
    """See the head of this module. `write` makes one write durable, or raises why not."""

    def __init__(
        self, store: Store, write: Callable[[Write, Resident | None], Awaitable[object]], clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._write = write
        self._clock = clock
        self._by_digest: dict[bytes, KeyRow] = {}
        self._used_at: dict[bytes, float] = {}
        """Last uses that are not written down."""
        self._reading = asyncio.Lock()
        self._read_at = -math.inf
        self.are_asked_for = False
        """Whether the store has, or had, keys since the start: then nobody calls without one."""

    def find(self, digest: bytes) -> KeyRow | None:
        """The key whose secret has this SHA-256, which counts as used now; None when there is none, or it has expired.

        Raises Unhealthy when it is not known whether it was taken back.
        """
        row = self._by_digest.get(digest)
        if row is None or not hmac.compare_digest(row.digest, digest):
            return None
        if time.monotonic() - self._read_at > STALE_S:
            raise Unhealthy("the keys of callers cannot be read from the store")
        now = self._clock()
        if row.expires_at is not None and now >= row.expires_at:
            return None
        self._used_at[digest] = now
        return row

    def counts(self, digest: bytes) -> bool:
        """Whether a key that was found counts still, for who asked with it and is not done; that is use, too."""
        try:
            return self.find(digest) is not None
        except Unhealthy:
            return False

    async def find_again(self, digest: bytes) -> KeyRow | None:
        """As `find`, of a key that is not known here: it may have been made elsewhere a moment ago."""
        if time.monotonic() - self._read_at > UNKNOWN_S:
            try:
                await self.read(newer_than=time.monotonic() - UNKNOWN_S)
            except Unhealthy:
                return None
        return self.find(digest)

    async def list(self, namespace: str | None) -> list[Key]:
        """The keys of one namespace, or all."""
        await self.read()
        rows = sorted(self._by_digest.values(), key=lambda row: (row.namespace, row.name))
        return [self._key(row) for row in rows if namespace in (None, row.namespace)]

    async def create(self, wish: KeyWish) -> tuple[Key, str]:
        """Make a key; with it its secret, which is told this once. Raises KeyExists, InvalidArgument."""
        _check(wish)
        if sum(row.namespace == wish.namespace for row in self._by_digest.values()) >= MAX_KEYS:
            raise InvalidArgument(f"there are {MAX_KEYS} keys in this namespace, which is the limit")
        secret, now = _new_secret(), self._clock()
        row = KeyRow(
            wish.namespace,
            wish.name,
            digest_of(secret),
            wish.role,
            now,
            expires_at=None if wish.expires_in_s is None else now + wish.expires_in_s,
            requests_per_second=wish.requests_per_second,
        )
        try:
            await self._write(CreateKey(row), None)
        except base.KeyExists:
            raise KeyExists(
                f"there is a key {wish.name!r} already; take it back first, or name this one otherwise"
            ) from None
        await self.read()
        return self._key(row), secret

    async def revoke(self, namespace: str, name: str) -> None:
        """Take a key back: refused here from now on, elsewhere within a second. Raises KeyNotFound."""
        try:
            await self._write(DeleteKey(namespace, name), None)
        except base.NoSuchKey:
            raise KeyNotFound(f"there is no key {quoted(name)}") from None
        finally:
            await self.read()

    async def read(self, newer_than: float = math.inf) -> None:
        """Read all keys from the store, unless that was done after `newer_than`. Raises Unhealthy."""
        async with self._reading:  # one after the other, so that none brings back what a later one found gone
            if self._read_at > newer_than:
                return
            began = time.monotonic()
            try:
                rows = await asyncio.to_thread(self._store.list_keys)
            except StoreError as error:
                raise Unhealthy(f"the keys of callers cannot be read: {error}") from error
            self._by_digest = {row.digest: row for row in rows}
            self._read_at = began
            self.are_asked_for |= bool(rows)

    async def run(self) -> None:
        """Read keys, and write down when they were used, for ever."""
        noted_at = time.monotonic()
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.read()
                if time.monotonic() - noted_at > NOTE_S:
                    noted_at = time.monotonic()
                    await self.note()
            except HTMError as error:
                logging.getLogger(__name__).warning("%s", error)
            except Exception:
                logging.getLogger(__name__).exception("the keys of callers are read again later")

    async def note(self) -> None:
        """Write down when keys were used."""
        used, self._used_at = self._used_at, {}
        rows = [(self._by_digest[digest], at) for digest, at in used.items() if digest in self._by_digest]
        writes = [self._write(UseKey(row.namespace, row.name, at), None) for row, at in rows]
        await asyncio.gather(*writes, return_exceptions=True)  # of one that is gone nothing is noted

    def _key(self, row: KeyRow) -> Key:
        last = self._used_at.get(row.digest, row.last_used_at)
        row = replace(row, last_used_at=last)
        return Key(
            name=row.name,
            role=_role(row),
            namespace=row.namespace,
            created_at=row.created_at,
            expires_at=row.expires_at,
            requests_per_second=row.requests_per_second,
            last_used_at=row.last_used_at,
        )


def digest_of(secret: str) -> bytes:
    """What is kept of a secret, and what it is found by."""
    return hashlib.sha256(secret.encode()).digest()


def _check(wish: KeyWish) -> None:
    if not validation.ID.fullmatch(wish.name) or wish.name in {".", ".."}:
        found = f"name is {quoted(wish.name)}"
        raise InvalidArgument(f"{found}, it must match {validation.ID.pattern}, and not be '.' or '..'")
    if wish.namespace != ALL_NAMESPACES:
        validation.check_namespace(wish.namespace)
    if wish.expires_in_s is not None and not 0 < wish.expires_in_s <= MAX_EXPIRES_S:
        raise InvalidArgument(f"expires_in_s is {wish.expires_in_s}, it must be above 0 and at most {MAX_EXPIRES_S}")
    if wish.requests_per_second is not None and not 0 < wish.requests_per_second <= 1e6:
        raise InvalidArgument(
            f"requests_per_second is {wish.requests_per_second}, it must be above 0 and at most 1000000"
        )


def _role(row: KeyRow) -> Role:
    """What a stored key may do; one that nobody knows may do the least."""
    return "admin" if row.role == "admin" else "write" if row.role == "write" else "read"


def _new_secret() -> str:
    number, digits = secrets.randbits(256), []
    for _ in range(_NUM_DIGITS):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "htm_" + "".join(digits)
