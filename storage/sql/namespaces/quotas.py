"""What namespaces with a quota hold, kept up by the one connection that writes; so no two appends pass it together.

Runs within a write's transaction. Does not know what is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from sqlalchemy import Connection, delete, insert

from storage.base import Quota, QuotaExceeded
from storage.sql.snapshot import Snapshot
from storage.sql.tables import quotas


@dataclass(slots=True)
class Usage:
    """A namespace's quota, and what it holds with all that was decided."""

    quota: Quota
    num_sessions: int
    num_tokens: int
    num_bytes: int

    def beyond(self, num_sessions: int, num_tokens: int, num_bytes: int) -> QuotaExceeded | None:
        """Why it may not hold so much more, or None."""
        return self.quota.check(
            self.num_sessions + num_sessions, self.num_tokens + num_tokens, self.num_bytes + num_bytes
        )

    def add(self, num_sessions: int, num_tokens: int, num_bytes: int) -> None:
        """It holds so much more."""
        self.num_sessions += num_sessions
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes


@dataclass(slots=True)
class Usages:
    """By namespace, from one group of writes to the next; wrong when a transaction was not committed."""

    known: dict[str, Usage | None] = field(default_factory=dict)
    """None where there is no quota."""

    def of(self, connection: Connection, namespace: str) -> Usage | None:
        """A namespace's, or None where it has no quota."""
        if namespace in self.known:
            return self.known[namespace]
        snapshot = Snapshot(connection)
        quota = snapshot.quota(namespace)
        has_limits = quota != Quota(namespace)
        usage = None
        if has_limits:
            num_sessions, num_tokens, num_bytes = snapshot.sums(namespace)
            usage = Usage(quota, num_sessions, num_tokens, num_bytes + snapshot.model_bytes(namespace))
        self.known[namespace] = usage
        return usage

    def set(self, connection: Connection, quota: Quota) -> Quota:
        """Write a quota down."""
        connection.execute(delete(quotas).where(quotas.c.namespace == quota.namespace))
        connection.execute(insert(quotas).values(asdict(quota)))
        self.known.pop(quota.namespace, None)
        return quota
