"""The query string of a call: known names, each once, and what their values say. Does not know: any call."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.requests import Request

from api.errors import shorten
from htm_service.errors import InvalidArgument


def check_names(request: Request, known: Collection[str], repeatable: Collection[str] = ()) -> None:
    """Raises InvalidArgument for a parameter that the call does not have, or that may not be there twice."""
    if not request.scope["query_string"]:
        return
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise InvalidArgument(f"unknown query parameter {shorten(name)}; known are {names}")
        if name in seen and name not in repeatable:
            raise InvalidArgument(f"the query parameter {name} is there more than once; it may be there once")
        seen.add(name)


def position(request: Request, name: str) -> int | None:
    """A position in the query string, if it is there."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if re.fullmatch(r"-?[0-9]{1,18}", text) is None:
        raise InvalidArgument(f"{name} is {shorten(text)}; it must be an integer")
    return int(text)


def included(request: Request, choices: tuple[str, ...], default: tuple[str, ...] = ()) -> set[str]:
    """The parts that `include` names, separated by commas."""
    text = request.query_params.get("include")
    if text is None:
        return set(default)
    parts = set(filter(None, text.split(",")))
    if not parts.issubset(choices):
        raise InvalidArgument(f"include is {shorten(text)}; it must be out of {', '.join(choices)}")
    return parts
