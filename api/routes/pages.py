"""The two HTML pages: /ui shows sessions from the JSON calls, /docs shows openapi.json; and the files they are made of.

Does not know: what the pages show. They hold no data: that is answered by the calls, to whoever may call them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

# Payloads come from anyone: the pages only ever set text, and this forbids the rest even if one did not.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}


def routes() -> list[Route]:
    """The routes of this module."""
    pages = [Route("/", to_ui, methods=["GET"])]
    for file in sorted(files("api").joinpath("ui").iterdir(), key=lambda file: file.name):
        name, _, suffix = file.name.rpartition(".")
        path = {"ui.html": "/ui", "docs.html": "/docs"}.get(file.name, f"/ui/{file.name}")
        pages.append(Route(path, shown(file.read_bytes(), _MEDIA_TYPES[f".{suffix}"]), methods=["GET"], name=name))
    return pages


def shown(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """The handler of one file, read once."""

    async def show(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return show


async def to_ui(request: Request) -> Response:
    """Whoever opens the bare address in a browser wants the page."""
    return RedirectResponse("/ui")
