"""Callers' keys: list, make, take back. Does not know: how a key is found, and what a role may do."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request
from starlette.responses import Response

from api.openapi import BODY_CODES, WRITE_CODES, problems
from api.routes.context import JsonRoute, caller_of, engine_of
from api.schemas.bodies import KeyBody
from api.schemas.views import Key, Keys, NewKey

_CODES = ("invalid_argument", "overloaded", "unhealthy", "draining", "internal_error")
_EXAMPLE = {"name": "agent-7", "role": "write", "expires_in_s": 2592000}

Wish = Annotated[KeyBody, Body(openapi_examples={"usual": {"value": _EXAMPLE}})]


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=JsonRoute)
    routes.add_api_route(
        "", list_keys, methods=["GET"], operation_id="list_keys", responses=problems(("unhealthy", "internal_error"))
    )
    routes.add_api_route(
        "",
        create,
        methods=["POST"],
        operation_id="create_key",
        status_code=201,
        responses=problems((*BODY_CODES, *WRITE_CODES, *_CODES, "key_exists")),
    )
    routes.add_api_route(
        "/{name}",
        revoke,
        methods=["DELETE"],
        operation_id="revoke_key",
        status_code=204,
        responses=problems((*WRITE_CODES, *_CODES, "key_not_found")),
    )
    return routes


async def list_keys(request: Request) -> Keys:
    """List the keys of the caller's namespace, or of all, without their secrets."""
    return Keys(keys=[Key.of(key) for key in await engine_of(request).list_keys(caller_of(request).sees)])


async def create(request: Request, wish: Wish) -> NewKey:
    """Make a key. Its secret is answered this once."""
    namespace = caller_of(request).space_for(wish.namespace)
    key, secret = await engine_of(request).create_key(wish.record(namespace))
    return NewKey(key=secret, **dict(Key.of(key)))


async def revoke(request: Request, name: str) -> Response:
    """Take a key back: it is refused within a second on every server of the store."""
    await engine_of(request).revoke_key(caller_of(request).space, name)
    return Response(status_code=204)
