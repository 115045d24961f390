"""Sessions that branch: fork and truncate. Does not know: how tokens are shared."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request
from starlette.responses import Response

from api.openapi import BODY_CODES, SESSION_CODES, WRITE_CODES, problems
from api.routes.context import JsonRoute, caller_of, engine_of, key_of
from api.schemas.bodies import ForkBody, TruncateBody
from api.schemas.views import Session, Truncated
from htm_service.records import SessionKey

_FORK = {"id": "agent-7-try-2", "length": 4096, "labels": {"try": "2"}}
_TRUNCATE = {"length": 0}

Fork = Annotated[ForkBody, Body(openapi_examples={"usual": {"value": _FORK}})]
Truncate = Annotated[TruncateBody, Body(openapi_examples={"usual": {"value": _TRUNCATE}})]


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], route_class=JsonRoute)
    codes = (*BODY_CODES, *SESSION_CODES, *WRITE_CODES)
    routes.add_api_route(
        "/fork",
        fork,
        methods=["POST"],
        operation_id="fork",
        status_code=201,
        responses=problems((*codes, "session_conflict", "quota_exceeded")),
    )
    routes.add_api_route(
        "/truncate",
        truncate,
        methods=["POST"],
        operation_id="truncate",
        responses=problems((*codes, "length_conflict")),
    )
    return routes


async def fork(request: Request, session_id: str, body: Fork, response: Response) -> Session:
    """Begin a new session with the first tokens of this one, which are shared, not copied."""
    space = caller_of(request).space
    new = SessionKey.new(space) if body.id is None else SessionKey(space, body.id)
    info = await engine_of(request).fork(key_of(request), new, body.length, body.labels)
    response.headers["Location"] = f"/v1/sessions/{info.id}"
    return Session.of(info)


async def truncate(request: Request, session_id: str, body: Truncate) -> Truncated:
    """Forget all tokens from a position on, at once and for good; positions are given again."""
    result = await engine_of(request).truncate(key_of(request), body.length, body.if_length)
    return Truncated(length=result.length, num_chunks=result.num_chunks)
