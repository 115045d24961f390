"""When to send a call again, after how long, and what its last attempt comes to. The clients send and sleep.

Most calls may be sent again whatever became of them: reads change nothing, PUT, PATCH and DELETE repeat
themselves, and appends and steps carry an idempotency key. One may not: a POST that makes a new session.
That one is sent again only when the server cannot have carried it out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeVar

from htm_client.calls import Call, parse
from htm_client.errors import ConnectionFailed, UnreadableAnswer
from htm_client.requests import Request
from htm_client.transport.base import NoResponse, Response

T = TypeVar("T")
Outcome = Response | NoResponse
"""What became of one attempt."""

REFUSED = frozenset({429, 503})
"""The server says: not now. It has done nothing."""
RETRIED = REFUSED | {502}
RETRIES = 9
"""They go on for 10 to 22 s: a server that is restarted, which takes up to 8 s, is met again."""
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
MAX_TOTAL_S = 60.0
"""No attempt begins later than this after the first one began, however long each takes."""
MAX_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Retry:
    """At most `retries` more attempts after the first."""

    retries: int

    def delay_s(self, attempt: int, call: Call, outcome: Outcome, elapsed_s: float = 0.0) -> float | None:
        """Seconds until the next attempt after attempt number `attempt` (from 0); None when this was the last.

        `elapsed_s` is the time since the first attempt began.
        """
        if attempt >= self.retries or not _is_worth_it(call, outcome):
            return None
        backoff = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, MAX_DOUBLINGS)) * random.uniform(0.5, 1.0)
        asked = 0.0
        if isinstance(outcome, Response):
            try:
                asked = float(outcome.headers.get("retry-after", 0))
            except ValueError:  # a date; then our own delay has to do
                asked = 0.0
        delay = min(MAX_DELAY_S, max(backoff, asked))
        return delay if elapsed_s + delay <= MAX_TOTAL_S else None


def finish(request: Request[T], attempt: int, outcome: Outcome) -> T:
    """The result of a call whose last attempt, number `attempt`, had this outcome. Raises HTMClientError."""
    call = request.call
    if isinstance(outcome, NoResponse):
        raise ConnectionFailed(f"{call.method} {call.path}: {outcome}") from outcome
    if call.method == "DELETE" and outcome.status == 404 and attempt > 0:
        # An earlier attempt deleted it and its answer was lost; either way it is gone, as asked.
        outcome = Response(204, outcome.headers, b"")
    answer = parse(outcome.status, outcome.headers, outcome.content)
    try:
        return request.read(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableAnswer(f"{call.method} {call.path} is answered, but not by htm-service: {error!r}") from error


def _is_worth_it(call: Call, outcome: Outcome) -> bool:
    if isinstance(outcome, Response):
        return outcome.status in (RETRIED if call.idempotent else REFUSED)
    return not outcome.is_hopeless and (call.idempotent or not outcome.may_be_done)
