"""Opaque cursors of listings: a key, as base64. Does not know what is listed."""

from __future__ import annotations

import base64
import contextlib
import re

from htm_service.errors import InvalidArgument, quoted


def encode_cursor(key: str) -> str:
    """An opaque cursor that continues after `key`."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, keys: re.Pattern[str]) -> str:
    """The key of a cursor, "" for none. Raises InvalidArgument for what does not look like one of the `keys`."""
    if not cursor:
        return ""
    with contextlib.suppress(ValueError):  # not ASCII, not base64, not UTF-8
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        if keys.fullmatch(key):
            return key
    raise InvalidArgument(f"cursor is {quoted(cursor)}, which no listing gave out")
