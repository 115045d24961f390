"""The store's failures in the domain's words. Does not know what was asked of the store."""

from __future__ import annotations

from htm_service.errors import DiskFull, HTMError, SessionDamaged, SessionNotFound, Unhealthy
from storage.base import SessionKey, SessionRow, Store, StoreDamaged, StoreError, StoreFull


def write_failure(error: StoreError) -> HTMError:
    """What a write that the store could not make is answered."""
    return DiskFull(str(error)) if isinstance(error, StoreFull) else Unhealthy(f"the store failed: {error}")


def unreadable(session_id: str, error: StoreError) -> HTMError:
    """What a read of a session that failed is answered."""
    if isinstance(error, StoreDamaged):
        return SessionDamaged(str(error))
    return Unhealthy(f"session {session_id!r} cannot be read: {error}")


def still_there(store: Store, key: SessionKey, sid: int) -> SessionRow:
    """The row of this very session, for whoever found that something of it is not in the store (a worker thread).

    Raises SessionNotFound when it was deleted meanwhile, though there may be another one of its name; and StoreError.
    """
    row = store.get_session(key)
    if row is None or row.sid != sid:
        raise SessionNotFound(f"there is no session {key.id!r}")
    return row
