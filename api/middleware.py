"""What holds for every request: an id, an answer even when the server's own code fails, a short way for hot calls.

Plain ASGI, because Starlette's middleware class costs a task per request. Does not know: bodies.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import answer, on_domain_error
from htm_service.errors import HTMError

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Gives each request an id (the client's own, when sane) and turns unexpected exceptions into 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # Random once, then counted: the system's random numbers cost more than the rest of this.
        self._ids = (f"{prefix}{number:08x}" for prefix in [secrets.token_hex(12)] for number in itertools.count())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["htm.request_id"] = incoming_id(scope) or next(self._ids)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception:
            logging.getLogger(__name__).exception(
                "request %s failed: %s %s", request_id, scope["method"], scope["path"]
            )
            if started:
                raise  # the server closes the connection, so that half an answer is not taken for a whole
            detail = "unexpected error; the server's log has it under this request_id"
            await answer(request_id, "internal_error", detail)(scope, receive, send_with_id)


class ShortWay:
    """Calls the endpoints of hot routes itself; everything else goes the framework's way, `app`.

    The framework's layers and its search for the route cost as much as the rest of a small call.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], owner: Starlette) -> None:
        self._app = app
        self._routes = [
            (route.path_regex, route.methods or (), RequestMiddleware(_endpoint(route))) for route in routes
        ]
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            for path, methods, call in self._routes:
                if (found := path.match(scope["path"])) is not None and scope["method"] in methods:
                    scope["app"], scope["path_params"] = self._owner, found.groupdict()
                    await call(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class _HotRequest(Request):
    """A request whose headers are a dict: Starlette's own search all of them each time."""

    @cached_property
    def headers(self) -> Mapping[str, str]:  # type: ignore[override]
        """By lower-case name; of several with one name the first counts, as in Starlette."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(self.scope["headers"])}


def _endpoint(route: Route) -> ASGIApp:
    """A route's endpoint as an app, with the domain's errors answered as the framework's way answers them."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        request = _HotRequest(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except HTMError as error:
            response = await on_domain_error(request, error)
        await response(scope, receive, send)

    return call


def incoming_id(scope: Scope) -> str | None:
    """The client's X-Request-Id, if it is one that may stand in a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _SANE_ID.fullmatch(value) else None
    return None
