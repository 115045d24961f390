"""What a call can raise; every answer of the server that is an error carries its stable `code`.

HTMClientError
├── InvalidArgument         the call is wrong and was not sent; a ValueError too
├── ConnectionFailed        no answer: refused, reset or timed out, after the retries
├── BatchFailed             items of a lock-step batch failed; `errors` says which, `result` has the others
├── FileFailed              the file of an export could not be written, or that of an import not be read
├── UnreadableAnswer        an answer that htm-service does not give: something else is at this address
└── RequestRefused          the server answered with an error
    ├── InvalidRequest      400, 405, 413, 415, 421, 422: the request is wrong and will stay wrong
    │   ├── Unauthenticated 401: no api_key, or one that the server does not know (any more)
    │   └── Forbidden       403: the api_key does not allow it
    ├── NotFound            404, 410
    ├── SessionConflict     409 session_conflict (and the other conflicts)
    │   ├── LengthConflict  409 length_conflict; `length` is the session's
    │   └── ModelConflict   412 model_conflict; `hash` is the model's
    └── ServerUnavailable   429, 5xx, after the retries
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MOST_NAMED = 4
"""Items that failed, in the text of an error."""


class HTMClientError(Exception):
    """A call that failed."""


class InvalidArgument(HTMClientError, ValueError):
    """The call is wrong, and nothing was sent."""


class ConnectionFailed(HTMClientError):
    """The server could not be reached, or did not answer in time."""


class FileFailed(HTMClientError):
    """The file of an export could not be written, or that of an import not be read; the cause is an OSError."""


class UnreadableAnswer(HTMClientError):
    """The answer is not one of htm-service."""


class RequestRefused(HTMClientError):
    """The server's answer is an error: `status`, stable `code`, `detail`, `request_id`, and what `extra` it says."""

    def __init__(self, status: int, code: str, detail: str, request_id: str, extra: Mapping[str, Any]) -> None:
        super().__init__(f"{code} ({status}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.extra = extra


class InvalidRequest(RequestRefused):
    """The request is wrong."""


class Unauthenticated(InvalidRequest):
    """The server does not know the `api_key`, or knows it no longer, or asks for one."""


class Forbidden(InvalidRequest):
    """The `api_key` does not allow it."""


class NotFound(RequestRefused):
    """What the request names is not there, or no longer."""


class SessionConflict(RequestRefused):
    """The request contradicts what is stored."""


class LengthConflict(SessionConflict):
    """`if_length` was not the session's length."""

    @property
    def length(self) -> int:
        """The session's length."""
        return int(self.extra["length"])


class ModelConflict(SessionConflict):
    """The model's hash was not `if_match`, or there is one of this name already."""

    @property
    def hash(self) -> str | None:
        """The model's; None where there is none."""
        found: str | None = self.extra["hash"]
        return found


class ServerUnavailable(RequestRefused):
    """The server cannot do it now."""


class ItemError(NamedTuple):
    """One item of a lock-step batch that failed: its place, its session, and what the single call would have raised."""

    item: int
    session: str
    error: RequestRefused


class BatchFailed(HTMClientError):
    """Items failed, which `errors` lists; `result` is what `errors="return"` would have answered, with the others."""

    def __init__(self, errors: Sequence[ItemError], num_items: int, result: Any) -> None:
        first = "; ".join(f"{error.session!r}: {error.error}" for error in errors[:MOST_NAMED])
        more = f"; and {len(errors) - MOST_NAMED} more" if len(errors) > MOST_NAMED else ""
        super().__init__(f"{len(errors)} of {num_items} items failed: {first}{more}")
        self.errors = errors
        self.result = result


def from_answer(status: int, problem: Mapping[str, Any], request_id: str) -> RequestRefused:
    """The error of a problem document."""
    code = str(problem.get("code", "unknown"))
    kind: type[RequestRefused]
    if code == "length_conflict":
        kind = LengthConflict
    elif code == "model_conflict":
        kind = ModelConflict
    elif status == 409:
        kind = SessionConflict
    elif status in {404, 410}:
        kind = NotFound
    elif status == 401:
        kind = Unauthenticated
    elif status == 403:
        kind = Forbidden
    elif status == 429 or status >= 500:
        kind = ServerUnavailable
    else:
        kind = InvalidRequest
    known = {"type", "title", "status", "detail", "code", "request_id"}
    extra = {name: value for name, value in problem.items() if name not in known}
    return kind(status, code, str(problem.get("detail", "")), str(problem.get("request_id", request_id)), extra)
