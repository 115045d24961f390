"""JSON text of what callers hand over: numpy's and torch's numbers and arrays among plain values.

Does not know what the values are for.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any) -> str:
    """The text. Raises ValueError for NaN and infinity, TypeError for what JSON does not have."""
    return json.dumps(value, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON: {value!r:.100}")
