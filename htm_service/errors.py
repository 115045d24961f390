"""The domain's errors; each has a stable `code`, and only `api/errors.py` knows the HTTP statuses.

HTMError
├── InvalidArgument      invalid_argument      a value is out of its range, shape or type
├── MalformedBody        malformed_body        bytes that cannot be parsed at all
├── BodyTooLarge         body_too_large        more bytes than the server takes in one request
├── UnsupportedMediaType unsupported_media_type
├── Unauthenticated      unauthenticated       no key, or one that does not count
├── Forbidden            forbidden             the caller's key does not allow it
├── NotFound
│   ├── SessionNotFound  session_not_found
│   ├── SessionExpired   session_expired       it existed, and was idle for longer than its ttl_s
│   ├── ModelNotFound    model_not_found
│   ├── ChunkNotFound    chunk_not_found
│   └── KeyNotFound      key_not_found         no caller's key has this name
├── Conflict
│   ├── SessionConflict  session_conflict      same id, other settings
│   ├── ModelInUse       model_in_use          sessions, or a file, keep a model from what is asked
│   ├── ModelConflict    model_conflict        the model's hash is not the one that the change is for
│   ├── KeyExists        key_exists            a caller's key of this name is there already
│   └── LengthConflict   length_conflict       `if_length` is not the session's length
├── SessionDamaged       session_damaged       stored bytes of the session cannot be read
├── IdempotencyMismatch  idempotency_mismatch  same key, other body
└── Unavailable                                try again later
    ├── Overloaded       overloaded            the queue is at its limit
    ├── Draining         draining              the server is stopping
    ├── Unhealthy        unhealthy             a thread died or is stuck, another server has the data, the store failed
    ├── DeadlineExceeded deadline_exceeded     the request's own time ran out
    ├── OutOfMemory      out_of_memory         the device budget cannot hold what is asked for
    ├── DiskFull         disk_full             the store could not write
    ├── QuotaExceeded    quota_exceeded        the namespace would hold more than it may
    └── RateLimited      rate_limited          the caller's own limit of requests

Does not know: HTTP, and the store's own errors (`storage/base.py`), which the engine translates.
"""

from __future__ import annotations

from typing import Any, ClassVar

QUOTED_CHARACTERS = 140


def clipped(text: str) -> str:
    """What a client sent, for a sentence: cut where it is long, lest an error be as large as a body."""
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}..."


def quoted(text: str) -> str:
    """The same in quotes."""
    return repr(clipped(text))


class HTMError(Exception):
    """An error with a stable `code`; `detail` is a sentence with the offending value and the limit."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra
        """Machine-readable fields that belong to the error, such as `length` of a LengthConflict."""


def without_frames(error: HTMError) -> HTMError:
    """The same error as an answer: without its traceback, nor that of what led to it.

    The frames there hold the request, and some of them the error: together a cycle, which would keep every refused
    body in memory until the garbage collector comes by.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__, cause = None, cause.__context__
    return error


class InvalidArgument(HTMError):
    """A value is out of its range, shape or type."""

    code = "invalid_argument"


class MalformedBody(HTMError):
    """The body cannot be parsed."""

    code = "malformed_body"


class BodyTooLarge(HTMError):
    """The body is larger than the server takes."""

    code = "body_too_large"


class UnsupportedMediaType(HTMError):
    """The content type is not one the call takes."""

    code = "unsupported_media_type"


class Unauthenticated(HTMError):
    """The request has no key, or none that counts."""

    code = "unauthenticated"


class Forbidden(HTMError):
    """The caller's key does not allow it."""

    code = "forbidden"


class NotFound(HTMError):
    """What the request names is not there."""


class SessionNotFound(NotFound):
    """No session has this id."""

    code = "session_not_found"


class SessionExpired(NotFound):
    """The session was idle for longer than its `ttl_s`."""

    code = "session_expired"


class ModelNotFound(NotFound):
    """No model has this name."""

    code = "model_not_found"


class ChunkNotFound(NotFound):
    """The session has no chunk of this index."""

    code = "chunk_not_found"


class KeyNotFound(NotFound):
    """No key has this name."""

    code = "key_not_found"


class Conflict(HTMError):
    """The request contradicts what is stored."""


class SessionConflict(Conflict):
    """The session exists with other settings."""

    code = "session_conflict"


class KeyExists(Conflict):
    """A key has this name already."""

    code = "key_exists"


class ModelInUse(Conflict):
    """Sessions name the model and do not fit what it is to become, or its name belongs to a file or is built in."""

    code = "model_in_use"


class ModelConflict(Conflict):
    """The model's hash is not the one that the change was conditioned on."""

    code = "model_conflict"


class LengthConflict(Conflict):
    """The session's length is not the one the append was conditioned on, or the attend's masks were made for."""

    code = "length_conflict"


class SessionDamaged(HTMError):
    """Stored bytes of this session do not match their checksum; others are not affected."""

    code = "session_damaged"


class IdempotencyMismatch(HTMError):
    """The idempotency key was used with another body."""

    code = "idempotency_mismatch"


class Unavailable(HTMError):
    """The server cannot do it now; `retry_after_s` seconds later it may."""

    retry_after_s: int = 1


class Overloaded(Unavailable):
    """The queue is at its limit."""

    code = "overloaded"


class Draining(Unavailable):
    """The server is stopping and takes no new work."""

    code = "draining"


class Unhealthy(Unavailable):
    """A thread died or is stuck, or another server has the data, both for good; or the store failed this time."""

    code = "unhealthy"


class DeadlineExceeded(Unavailable):
    """The request's deadline passed before its work began."""

    code = "deadline_exceeded"


class OutOfMemory(Unavailable):
    """The device budget cannot hold what is asked for."""

    code = "out_of_memory"


class QuotaExceeded(Unavailable):
    """The namespace would hold more than its quota allows."""

    code = "quota_exceeded"


class RateLimited(Unavailable):
    """The caller asks more often than its key allows."""

    code = "rate_limited"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class DiskFull(Unavailable):
    """The store could not write."""

    code = "disk_full"
