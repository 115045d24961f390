"""JSON text of what callers hand over: numpy's and torch's numbers and arrays among plain values.

Does not know what the values are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from htm_client.errors import InvalidArgument


def dumps(value: Any) -> str:
    """The text. Raises InvalidArgument for NaN, infinity and circles, TypeError for what JSON does not have."""
    try:
        return _ENCODER.encode(value)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"this cannot be sent as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    # Dates would become numbers, and a longdouble, wider than any number of JSON's, stays one.
    if hasattr(value, "tolist") and getattr(value.dtype, "kind", "") not in ("m", "M"):
        plain = value.tolist()  # numpy scalars and arrays, torch tensors
        if type(plain) is not type(value):
            return plain
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON: {value!r:.100}")


_ENCODER = json.JSONEncoder(allow_nan=False, default=_plain)
"""One for all calls: `json.dumps` would make one for each."""
