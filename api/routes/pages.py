"""The two HTML pages: /ui shows sessions from the JSON calls, /docs shows openapi.json. No other assets.

Does not know: what the pages show; each is a file that reads the JSON beside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

# Payloads come from anyone: the pages only ever set text, and this forbids the rest even if one did not.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The routes of this module."""
    return [
        Route("/", to_ui, methods=["GET"]),
        Route("/ui", page("ui.html"), methods=["GET"]),
        Route("/docs", page("docs.html"), methods=["GET"]),
    ]


def page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """The handler of one page, read once."""
    content = files("api").joinpath("ui", name).read_bytes()

    async def show(request: Request) -> Response:
        return HTMLResponse(content, headers=_HEADERS)

    return show


async def to_ui(request: Request) -> Response:
    """Whoever opens the bare address in a browser wants the page."""
    return RedirectResponse("/ui")
