"""Who may call. Without keys, only this machine: a web page of elsewhere must not reach the server through a browser.

Does not know: calls, and what the answer to one who may not looks like.
"""

from __future__ import annotations

from functools import lru_cache

from starlette.types import Scope

from api.errors import shorten
from api.settings import is_loopback

Refusal = tuple[str, str]
"""The code of a refusal, and a sentence."""

OPEN = frozenset({"/livez", "/readyz"})
"""Paths that anyone may ask."""


def refusal(scope: Scope) -> Refusal | None:
    """Why a request to a server on loopback is refused; None when it may go on.

    A page on the web can have its own name resolve to this machine, and then reads what we answer: its `Host` gives
    it away. Or it sends to us what needs no answer to do harm, and its `Origin` gives it away.
    """
    if scope["path"] in OPEN:
        return None
    for name, value in scope["headers"]:
        if name == b"host" and not is_here(value):
            host = shorten(value.decode("latin-1"))
            return "misdirected_request", f"the host is {host}; this server answers on loopback only, as localhost"
        if name == b"origin" and not is_here(value.partition(b"://")[2]):
            return "forbidden", f"the origin is {shorten(value.decode('latin-1'))}; only pages of this machine may call"
    return None


@lru_cache
def is_here(host: bytes) -> bool:
    """Whether a host, with or without its port, is this machine by a name that nobody else can give it."""
    name = host.decode("latin-1").lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    return is_loopback(name)
