"""What goes wrong in drivers and library, and in what they read, in the words of the contract."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage.base import CheckSettings, Store, StoreError, StoreFull, StoreUnavailable

DISK_FULL = ("SQLITE_FULL", "53100")
"""What SQLite and PostgreSQL call it."""

DAMAGED = ("XX001", "XX002", "58030")
"""What PostgreSQL calls damage: of a table, of an index, of the disk."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise the errors of driver and library as StoreFull or StoreError."""
    try:
        yield
    except DBAPIError as error:
        codes = (getattr(error.orig, name, None) for name in ("sqlite_errorname", "sqlstate"))
        name = next(filter(None, codes), type(error.orig).__name__)
        if name in DISK_FULL:
            raise StoreFull(f"the disk is full: {error.orig}") from error
        raise StoreError(f"{error.orig} ({name})") from error
    except SQLAlchemyError as error:
        raise StoreError(str(error)) from error
    except (OverflowError, UnicodeError) as error:  # from the driver: a number or a text it cannot express
        raise StoreError(f"a value cannot be stored: {error}") from error


@contextlib.contextmanager
def closed_unless_opened(store: Store, name: object) -> Iterator[None]:
    """Raise StoreUnavailable for whatever goes wrong while the store is opened, and close it then."""
    try:
        with translated():
            yield
    except StoreUnavailable:
        store.close()
        raise
    except StoreError as error:
        store.close()
        raise StoreUnavailable(f"{name} cannot be opened: {error}") from error


def is_damage(error: DBAPIError) -> bool:
    """Whether stored bytes are what is wrong. SQLite has its file at hand: whatever fails there, except waiting for
    another process, does so because of what it reads."""
    name = getattr(error.orig, "sqlite_errorname", None)
    if name is not None:
        return not name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    return getattr(error.orig, "sqlstate", None) in DAMAGED


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """Settings, or None where they are damaged: that is one session's trouble, not that of a whole list."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def trouble_with(text: str, check: CheckSettings) -> str | None:
    """Why stored settings cannot be read, as a sentence without a full stop; None when they can."""
    settings = json_object(text)
    wrong = "they are no JSON object" if settings is None else check(settings)
    return None if wrong is None else f"its settings cannot be read: {wrong}"
