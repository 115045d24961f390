"""From errors to answers: the only table of codes and HTTP statuses, and problem+json (RFC 9457).

Does not know: what the routes do, and how a request was parsed.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from htm_service.config import NAME_PATTERN
from htm_service.errors import HTMError, Unavailable, clipped, quoted, without_frames

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """What a code means: its status, its title (the same in every answer) and an example of a detail."""

    status: int
    title: str
    example: str


PROBLEMS: Mapping[str, Problem] = {
    "malformed_body": Problem(400, "The body cannot be parsed", "the body is not JSON: unexpected end of data"),
    "unauthenticated": Problem(401, "There is no key that counts", "there is no key; send one as Bearer KEY"),
    "forbidden": Problem(
        403, "The caller may not", "the origin is 'https://example.org'; only pages of this machine may call"
    ),
    "not_found": Problem(404, "There is nothing at this path", "there is nothing at /v2/sessions"),
    "session_not_found": Problem(404, "No such session", "no session has the id 'agent-7'"),
    "model_not_found": Problem(404, "No such model", "no model has the name 'navigator'"),
    "key_not_found": Problem(404, "No such key", "there is no key 'agent-7'"),
    "chunk_not_found": Problem(404, "No such chunk", "session 'agent-7' has 3 chunks, so none of index 9"),
    "method_not_allowed": Problem(405, "The path does not take this method", "/v1/info does not take PUT"),
    "session_conflict": Problem(
        409, "The session exists with other settings", "session 'agent-7' has dim 256, not 512"
    ),
    "key_exists": Problem(409, "There is a key of this name", "there is a key 'agent-7' already"),
    "model_in_use": Problem(
        409, "Something else needs the model, or its name", "model 'navigator' cannot be deleted: sessions name it"
    ),
    "length_conflict": Problem(409, "The session has another length", "the length is 40, not if_length 39"),
    "session_expired": Problem(410, "The session has expired", "session 'agent-7' was idle for longer than 60 s"),
    "model_conflict": Problem(
        412, "The model is not the one that the change is for", "the model has the hash 4f6c1b1d, not that of If-Match"
    ),
    "body_too_large": Problem(413, "The body is too large", "the body has 100000000 bytes, the limit is 67108864"),
    "unsupported_media_type": Problem(
        415, "The content type is not supported", "the content type is 'text/plain'; use application/json"
    ),
    "misdirected_request": Problem(
        421, "The request is for another host", "the host is 'example.org'; this server answers on loopback only"
    ),
    "invalid_argument": Problem(422, "A value is not valid", "embeddings have width 3, the session's dim is 4"),
    "idempotency_mismatch": Problem(
        422, "The idempotency key was used with another body", "key 'step-12' was used with another body"
    ),
    "headers_too_large": Problem(
        431, "The request's head is too large", "the request's head has more than 65536 bytes"
    ),
    "internal_error": Problem(500, "The server failed", "unexpected error; the server's log has it under request_id"),
    "session_damaged": Problem(
        409, "The session is damaged", "session 'agent-7' is damaged at position 96: its checksum is wrong"
    ),
    "rate_limited": Problem(429, "The key's own limit", "this key is good for 10 requests a second"),
    "overloaded": Problem(503, "The queue is full", "4096 requests are waiting, the limit is 4096"),
    "draining": Problem(503, "The server is stopping", "the server is stopping and takes no new work"),
    "unhealthy": Problem(503, "The server is not healthy", "the device thread has died"),
    "deadline_exceeded": Problem(504, "The deadline has passed", "not begun within 250 ms"),
    "out_of_memory": Problem(507, "The memory budget is exhausted", "needs 8 GiB, the budget is 4 GiB"),
    "quota_exceeded": Problem(
        507, "The namespace's quota is used up", "the namespace would hold 11 sessions, its quota is 10"
    ),
    "disk_full": Problem(507, "The disk is full", "the store could not write: no space left on device"),
}

RETRY_STATUSES = frozenset({429, 503, 507})
"""Statuses whose answers carry `Retry-After`."""

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 400: "malformed_body", 413: "body_too_large"}


def status_of(code: str) -> int:
    """The HTTP status of a code."""
    return PROBLEMS[code].status


def document(code: str, detail: str, request_id: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The problem document of an error with this code."""
    problem = PROBLEMS[code]
    own = {
        "type": f"urn:htm-service:problem:{code}",
        "title": problem.title,
        "status": problem.status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    return {**(extra or {}), **own}


def answer(
    scope: Scope,
    code: str,
    detail: str,
    *,
    extra: Mapping[str, Any] | None = None,
    retry_after_s: int = Unavailable.retry_after_s,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that tells a client of an error, which is noted as that of the request."""
    if (measured := scope.get("htm.measured")) is not None:
        measured.code = code
    status = PROBLEMS[code].status
    own = dict(headers or {})
    if status in RETRY_STATUSES:
        own["Retry-After"] = str(retry_after_s)
    if code == "unauthenticated":
        own["WWW-Authenticate"] = "Bearer"
    if code in ("body_too_large", "draining"):
        # What is left of the body may still be on its way, so the connection cannot carry another request. A server
        # that stops will close its connections, so that nobody may begin one more on them.
        own["Connection"] = "close"
    told = document(code, detail, scope.get("htm.request_id", ""), extra)
    content = orjson.dumps(told, default=str, option=orjson.OPT_NON_STR_KEYS)
    return Response(content, status, own, MEDIA_TYPE)


def request_id_of(request: Request) -> str:
    """The id the middleware gave this request."""
    return str(request.scope.get("htm.request_id", ""))


async def on_domain_error(request: Request, error: Exception) -> Response:
    """Handler of HTMError."""
    assert isinstance(error, HTMError)
    return domain_answer(request.scope, error)


def domain_answer(scope: Scope, error: HTMError) -> Response:
    """The answer to an error: status by the table. A code that the table does not know is a bug, told as one."""
    if error.code not in PROBLEMS or error.code == "internal_error":
        raise error
    retry = error.retry_after_s if isinstance(error, Unavailable) else Unavailable.retry_after_s
    told = answer(scope, error.code, error.detail, extra=error.extra, retry_after_s=retry)
    without_frames(error)
    return told


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Handler of FastAPI's RequestValidationError: names the field, what is wrong, and the value."""
    assert isinstance(error, RequestValidationError)
    return answer(request.scope, "invalid_argument", validation_detail(error.errors()))


def validation_detail(errors: Sequence[Any]) -> str:
    """A sentence for the first of pydantic's errors."""
    first = errors[0]
    field = clipped(".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{field or 'the body'} is required"
    return f"{field or 'the body'}: {message}; got {shorten(first['input'])}"


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler of Starlette's own HTTPException: unknown paths, methods, bodies that FastAPI cannot read."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "internal_error")
    path = request.scope["path"]
    headers = dict(error.headers or {})
    if code == "method_not_allowed":
        headers["Allow"] = ", ".join(allowed_methods(request))
    detail = {
        "not_found": f"there is nothing at {shorten(path)}{_about_ids(path)}",
        "method_not_allowed": f"{shorten(path)} does not take {request.method}",
    }.get(code, str(error.detail))
    return answer(request.scope, code, detail, headers=headers)


def allowed_methods(request: Request) -> list[str]:
    """The methods that a path takes: each has a route of its own, and the framework names those of one of them."""
    routes: Sequence[BaseRoute] = request.app.routes
    found = [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return ["HEAD", *found] if "GET" in found else found


class _Brief(reprlib.Repr):
    """The first few items of each list and object, a few levels deep: what is cut costs nothing, and cannot recurse."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 4, 8, 4
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In its own order: the standard's sorts all keys first."""
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)


def _about_ids(path: str) -> str:
    """What to add about an unknown path that may be an id with a slash, however the client wrote that."""
    return f"; session ids match {NAME_PATTERN}, so they have no slash" if path.startswith("/v1/sessions/") else ""


def shorten(value: object) -> str:
    """A value for a sentence: its repr, cut where it is long or deep."""
    return quoted(value) if isinstance(value, str) else clipped(_Brief().repr(value))
