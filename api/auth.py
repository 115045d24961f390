"""Who may call, and what: the key of a request, its role and its namespace.

Without keys, only this machine: a web page of elsewhere must not reach the server through a browser.
Does not know: what calls do, where keys are kept, and what the answer to one who may not call looks like.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from starlette.types import Scope

from api.errors import shorten
from api.settings import is_loopback
from htm_service.errors import Forbidden, RateLimited, Unauthenticated
from htm_service.records import ALL_NAMESPACES, DEFAULT_NAMESPACE, Role

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none
    from htm_service.writes.keys import Keys

Refusal = tuple[str, str]
"""The code of a refusal, and a sentence."""

OPEN = frozenset({"/livez", "/readyz"})
"""Paths that anyone may ask, by any name of this machine."""
PAGES = frozenset({"/", "/ui", "/docs", "/openapi.json"})
"""Paths that hold no data: the page asks for a key itself."""
PAGE_FILES = "/ui/"

RANKS: Mapping[Role, int] = {"read": 0, "write": 1, "admin": 2}
ROLES: Mapping[str, Role] = {
    "livez": "read",
    "readyz": "read",
    "info": "read",
    "metrics": "admin",
    "list_models": "read",
    "inspect_model": "read",
    "put_model": "admin",
    "delete_model": "admin",
    "list_sessions": "read",
    "create_session": "write",
    "put_session": "write",
    "inspect_session": "read",
    "update_session": "write",
    "delete_session": "write",
    "fork": "write",
    "truncate": "write",
    "append": "write",
    "read_memories": "read",
    "attend": "read",
    "step": "write",
    "list_chunks": "read",
    "inspect_chunk": "read",
    "list_recalls": "read",
    "session_heat": "read",
    "explain": "read",
    "select": "read",
    "search": "read",
    "search_all": "read",
    "batch_search": "read",
    "events": "read",
    "delete_sessions": "write",
    "export_session": "read",
    "import_session": "write",
    "list_keys": "admin",
    "create_key": "admin",
    "revoke_key": "admin",
    "get_quota": "admin",
    "put_quota": "admin",
    "batch_append": "write",
    "batch_attend": "read",
    "batch_step": "write",
    "batch_select": "read",
    "batch_truncate": "write",
}
"""What a caller must be at least, by operationId; of a call that is missing here: an admin."""
OF_ALL_NAMESPACES = frozenset({"metrics", "put_quota"})
"""Calls that tell of all namespaces, or limit one, so that only admins of all may make them."""

MAX_BUCKETS = 10_000
"""Keys with a rate of their own whose requests are counted."""
MAX_REMEMBERED = 10_000
MAX_REMEMBERED_BYTES = 256
"""Headers with keys that were found, and of how many bytes each, whose hashes are kept."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the role, and the namespace of the key."""

    role: Role
    namespace: str
    named: str | None = None
    """The namespace that a caller of all namespaces named."""
    is_known: bool = True
    """False on a server without keys, which asks nobody who they are."""
    digest: bytes | None = None
    """What its key is found by; None of a key that the server was started with, or of none."""

    def still_counts(self, keys: Keys) -> bool:
        """Whether its key has been neither taken back nor expired."""
        return self.digest is None or keys.counts(self.digest)

    def check(self, operation: str) -> None:
        """Raise Forbidden for a call that this caller may not make."""
        needed = ROLES.get(operation, "admin")
        if RANKS[self.role] < RANKS[needed]:
            raise Forbidden(f"{operation} needs a key of the role {needed}, this one's is {self.role}")
        if operation == "create_key" and not self.is_known:
            raise Forbidden("this server asks for no keys; start it with an admin's key, HTM_API_KEY, to make others")
        if operation in OF_ALL_NAMESPACES and self.namespace != ALL_NAMESPACES:
            raise Forbidden(f"{operation} needs an admin's key of the namespace {ALL_NAMESPACES}")

    @property
    def sees(self) -> str | None:
        """The namespace whose counts and keys it sees; None for all."""
        return self.named if self.namespace == ALL_NAMESPACES else self.namespace

    def space_for(self, wanted: str | None) -> str:
        """The namespace of what is made for `wanted`. Raises Forbidden for one that is not the caller's."""
        if wanted in (None, self.space):
            return self.space
        if self.namespace != ALL_NAMESPACES:
            raise Forbidden("this key opens one namespace, and the request is for another")
        return str(wanted)

    @property
    def space(self) -> str:
        """The namespace of the sessions that a call is about."""
        return DEFAULT_NAMESPACE if self.sees is None else self.sees


ADMIN = Caller("admin", ALL_NAMESPACES)
"""Who has the key that the server was started with."""
ANYONE = Caller("admin", ALL_NAMESPACES, is_known=False)
"""Who asks a server without keys, or for what is open to all."""


class Bucket:
    """A key's own rate: a second's worth of requests at once, then one by one. Times are in seconds."""

    __slots__ = ("at", "left")

    def __init__(self, at: float, left: float) -> None:
        self.at = at
        self.left = left

    def wait_s(self, now: float, per_second: float) -> float:
        """0 when a request may go on, which counts; else for how long it may not."""
        self.left = min(max(1.0, per_second), self.left + (now - self.at) * per_second)
        self.at = now
        if self.left < 1.0:
            return (1.0 - self.left) / per_second
        self.left -= 1.0
        return 0.0


class Auth:
    """See the head of this module. `admin_key` is the one that the server was started with."""

    def __init__(self, admin_key: str | None, *, insecure: bool, metrics_open: bool) -> None:
        self._admin_digest = None if admin_key is None else hashlib.sha256(admin_key.encode()).digest()
        self._insecure = insecure
        self._open = OPEN | PAGES | ({"/metrics"} if metrics_open else set())
        self._buckets: dict[bytes, Bucket] = {}
        self._digests: dict[bytes, bytes] = {}
        """By the header that a key came in, its hash: to make it again for each request costs more than all else."""

    async def admit(self, scope: Scope, keys: Keys) -> Caller | Refusal:
        """Who asks, or why this server on loopback refuses to say. Raises Unauthenticated, Forbidden, RateLimited, and
        Unhealthy where it cannot be known.
        """
        path: str = scope["path"]
        if self._admin_digest is None and not keys.are_asked_for:
            return (None if self._insecure else refusal(scope)) or _in_namespace(ANYONE, _headers(scope)[1])
        if path in self._open or path.startswith(PAGE_FILES):
            return ANYONE
        authorization, named = _headers(scope)
        digest = self._digest_of(authorization)
        if self._admin_digest is not None and hmac.compare_digest(digest, self._admin_digest):
            self._remember(authorization, digest)
            return _in_namespace(ADMIN, named)
        key = keys.find(digest) or await keys.find_again(digest)
        if key is None:
            raise Unauthenticated("the key is not known: it is another server's, was taken back, or has expired")
        self._remember(authorization, digest)
        if key.requests_per_second is not None:
            self._count(key.digest, key.requests_per_second)
        return _in_namespace(_caller(key.role, key.namespace, digest), named)

    def _digest_of(self, authorization: bytes | None) -> bytes:
        """The hash of a header's key. Raises Unauthenticated."""
        if authorization is not None and (known := self._digests.get(authorization)) is not None:
            return known
        return hashlib.sha256(_secret(authorization)).digest()

    def _remember(self, authorization: bytes | None, digest: bytes) -> None:
        """Keep the hash of a key that counts; whether it still does is asked each time."""
        if authorization is None or authorization in self._digests or len(authorization) > MAX_REMEMBERED_BYTES:
            return
        if len(self._digests) >= MAX_REMEMBERED:
            self._digests.clear()
        self._digests[authorization] = digest

    def _count(self, digest: bytes, per_second: float) -> None:
        now = time.monotonic()
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.clear()
        bucket = self._buckets.get(digest)
        if bucket is None:
            bucket = self._buckets[digest] = Bucket(now, max(1.0, per_second))
        if wait_s := bucket.wait_s(now, per_second):
            raise RateLimited(f"this key is good for {per_second:g} requests a second", math.ceil(wait_s))


def _headers(scope: Scope) -> tuple[bytes | None, bytes | None]:
    """What a request has in Authorization and in X-HTM-Namespace."""
    authorization = named = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            authorization = value
        elif name == b"x-htm-namespace":
            named = value
    return authorization, named


def _secret(authorization: bytes | None) -> bytes:
    """What follows `Bearer`. Raises Unauthenticated."""
    if authorization is None:
        raise Unauthenticated("there is no key; send one in the header Authorization, as Bearer KEY")
    if authorization[:7].lower() != b"bearer ":
        raise Unauthenticated("the header Authorization holds no Bearer KEY")
    return authorization[7:].strip()


@lru_cache
def _caller(role: str, namespace: str, digest: bytes) -> Caller:
    """Who has a key; a role that nobody knows allows the least."""
    known: Role = "admin" if role == "admin" else "write" if role == "write" else "read"
    return Caller(known, namespace, digest=digest)


def _in_namespace(caller: Caller, named: bytes | None) -> Caller:
    """The caller in the namespace that its request names, if any. Raises Forbidden for one that is not the key's."""
    if named is None:
        return caller
    namespace = named.decode("latin-1")
    if caller.namespace == ALL_NAMESPACES:
        return replace(caller, named=namespace)
    if caller.namespace != namespace:
        raise Forbidden("this key opens one namespace, and X-HTM-Namespace names another")
    return caller


def refusal(scope: Scope) -> Refusal | None:
    """Why a request to a server on loopback is refused; None when it may go on.

    A page on the web can have its own name resolve to this machine, and then reads what we answer: its `Host` gives
    it away. Or it sends to us what needs no answer to do harm, and its `Origin` gives it away.
    """
    if scope["path"] in OPEN:
        return None
    for name, value in scope["headers"]:
        if name == b"host" and not is_here(value):
            host = shorten(value.decode("latin-1"))
            return "misdirected_request", f"the host is {host}; this server answers on loopback only, as localhost"
        if name == b"origin" and not is_here(value.partition(b"://")[2]):
            return "forbidden", f"the origin is {shorten(value.decode('latin-1'))}; only pages of this machine may call"
    return None


@lru_cache
def is_here(host: bytes) -> bool:
    """Whether a host, with or without its port, is this machine by a name that nobody else can give it."""
    name = host.decode("latin-1").lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    return is_loopback(name)
