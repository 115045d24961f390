"""The store's failures in the domain's words. Does not know what was asked of the store."""

from __future__ import annotations

from htm_service.errors import DiskFull, HTMError, SessionDamaged, Unhealthy
from storage.base import StoreDamaged, StoreError, StoreFull


def write_failure(error: StoreError) -> HTMError:
    """What a write that the store could not make is answered."""
    return DiskFull(str(error)) if isinstance(error, StoreFull) else Unhealthy(f"the store failed: {error}")


def unreadable(session_id: str, error: StoreError) -> HTMError:
    """What a read of a session that failed is answered."""
    if isinstance(error, StoreDamaged):
        return SessionDamaged(str(error))
    return Unhealthy(f"session {session_id!r} cannot be read: {error}")
