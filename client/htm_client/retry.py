"""When to send a call again, and after how long. Pure: the clients do the sending and the sleeping.

Every call may be sent again: reads change nothing, PUT, PATCH and DELETE repeat themselves, and appends and
steps carry an idempotency key.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

RETRIED = frozenset({429, 502, 503})
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class Retry:
    """At most `retries` more attempts after the first."""

    retries: int

    def delay_s(self, attempt: int, status: int | None, headers: Mapping[str, str]) -> float | None:
        """Seconds until the next attempt after attempt number `attempt` (from 0) failed; None to give up.

        `status` is None when no answer came.
        """
        if attempt >= self.retries or (status is not None and status not in RETRIED):
            return None
        backoff = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**attempt) * random.uniform(0.5, 1.0)
        try:
            asked = float(headers.get("retry-after", 0))
        except ValueError:
            asked = 0.0
        return min(MAX_DELAY_S, max(asked, backoff))
