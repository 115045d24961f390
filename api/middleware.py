"""What holds for every request: an id, an answer even when the server's own code fails, a short way for hot calls.

Plain ASGI, because Starlette's middleware class costs a task per request. Does not know: bodies.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Auth
from api.errors import answer, domain_answer
from api.logs import REQUEST_ID
from api.metrics import Measured, Metrics
from api.tracing import Traces
from htm_service.errors import HTMError

Endpoint = Callable[[Request], Awaitable[Response]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Front:
    """The one middleware. Every request gets an id (the client's own, when sane) and an answer, even when code fails;
    `auth` says who asks, or that nobody may.

    The endpoints of hot routes it calls itself: the framework's layers and its search for the route cost as much as
    the rest of a small call. Everything else goes the framework's way.
    """

    def __init__(
        self,
        framework: ASGIApp,
        routes: Sequence[Route],
        owner: Starlette,
        metrics: Metrics,
        traces: Traces | None,
        auth: Auth,
    ) -> None:
        self._framework = framework
        self._metrics = metrics
        self._traces = traces
        self._auth = auth
        self._routes = [(route.path_regex, route.methods or (), route.endpoint) for route in routes]
        self._owner = owner
        self._ids = new_ids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._framework(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET, without the body (RFC 9110, 9.3.2)
            scope, send = {**scope, "method": "GET"}, without_body(send)
        try:
            await self._serve(scope, receive, send)
        finally:
            if "htm.held" in scope:
                self._owner.state.room.leave(scope)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["htm.request_id"] = incoming_id(scope) or next(self._ids)
        REQUEST_ID.set(request_id)
        measured = scope["htm.measured"] = Measured()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], id_header(request_id)]
            await send(message)

        try:
            answered = await self._answer(scope, receive, send)
            if answered is None:
                await self._framework(scope, receive, send_with_id)
                self._note(scope, measured, status)
                return
            response = answered
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception:
            response = on_failure(scope)
            if status:
                raise  # the server closes the connection, so that half an answer is not taken for a whole
        response.raw_headers.append(id_header(request_id))  # a whole answer: there is nothing to wrap
        await response(scope, receive, send)
        self._note(scope, measured, response.status_code)

    def _note(self, scope: Scope, measured: Measured, status: int) -> None:
        """What was measured of a request that was answered."""
        self._metrics.count(measured, status)
        if self._traces is not None:
            self._traces.add(scope, measured, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """What is answered without the framework: to who may not call, and to the hot calls."""
        try:
            admitted = await self._auth.admit(scope, self._owner.state.engine.keys)
            if isinstance(admitted, tuple):
                return answer(scope, *admitted, headers={"Connection": "close"})
            scope["htm.caller"] = admitted
            endpoint = self._endpoint(scope)
            return None if endpoint is None else await endpoint(_HotRequest(scope, receive, send))
        except HTMError as error:
            return domain_answer(scope, error)

    def _endpoint(self, scope: Scope) -> Endpoint | None:
        """The hot endpoint of a request, which gets what the framework would tell it."""
        for path, methods, endpoint in self._routes:
            if (found := path.match(scope["path"])) is not None and scope["method"] in methods:
                scope["app"], scope["path_params"] = self._owner, found.groupdict()
                return endpoint
        return None


class _HotRequest(Request):
    """A request whose headers are a dict: Starlette's own search all of them each time."""

    headers: Mapping[str, str] = {}  # type: ignore[assignment]
    """By lower-case name; of several with one name the first counts, as in Starlette."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


def on_failure(scope: Scope) -> Response:
    """The answer to a request that failed with an unexpected exception, which goes to the log."""
    request_id = scope["htm.request_id"]
    logging.getLogger(__name__).exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
    detail = "unexpected error; the server's log has it under this request_id"
    return answer(scope, "internal_error", detail)


def without_body(send: Send) -> Send:
    """A `send` that passes on an answer's head only."""

    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def new_ids() -> Iterator[str]:
    """Request ids: random once, then counted. The system's random numbers cost more than all else here."""
    prefix = secrets.token_hex(12)
    return (f"{prefix}{number:08x}" for number in itertools.count())


def incoming_id(scope: Scope) -> str | None:
    """The client's X-Request-Id, if it is one that may stand in a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _SANE_ID.fullmatch(value) else None
    return None


def id_header(request_id: str) -> tuple[bytes, bytes]:
    """The header of every answer."""
    return b"x-request-id", request_id.encode()
