"""What holds for every request: an id, and an answer even when the server's own code fails.

Plain ASGI, because Starlette's middleware class costs a task per request. Does not know: routes and bodies.
"""

from __future__ import annotations

import logging
import re
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import answer

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Gives each request an id (the client's own, when sane) and turns unexpected exceptions into 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["htm.request_id"] = incoming_id(scope) or uuid.uuid4().hex
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


def incoming_id(scope: Scope) -> str | None:
    """The client's X-Request-Id, if it is one that may stand in a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _SANE_ID.fullmatch(value) else None
    return None
