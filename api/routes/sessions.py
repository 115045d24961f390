"""Sessions: create, confirm, list, inspect, change, delete. Does not know: their tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Query
from starlette.requests import Request
from starlette.responses import Response

from api.errors import shorten
from api.openapi import BODY_CODES, SESSION_CODES, WRITE_CODES, problems
from api.routes.context import JsonRoute, caller_of, engine_of, key_of, settings_of
from api.schemas.bodies import CreateBody, SessionChange
from api.schemas.views import Deleted, Session, SessionPage, to_json
from api.wire.answers import respond_json
from htm_service.errors import InvalidArgument
from htm_service.records import SessionKey

_CREATE_CODES = (
    *BODY_CODES,
    *WRITE_CODES,
    "quota_exceeded",
    "model_not_found",
    "invalid_argument",
    "overloaded",
    "unhealthy",
    "draining",
    "internal_error",
)
_EXAMPLE = {"dim": 512, "chunk_size": 32, "labels": {"agent": "7"}, "ttl_s": 86400}

Settings = Annotated[CreateBody, Body(openapi_examples={"usual": {"value": _EXAMPLE}})]
Change = Annotated[SessionChange, Body(openapi_examples={"usual": {"value": {"labels": {"agent": "8"}}}})]


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=JsonRoute)
    routes.add_api_route(
        "",
        create,
        methods=["POST"],
        operation_id="create_session",
        status_code=201,
        responses=problems(_CREATE_CODES),
    )
    routes.add_api_route(
        "",
        list_sessions,
        methods=["GET"],
        operation_id="list_sessions",
        response_model=SessionPage,
        responses=problems(("invalid_argument", "unhealthy", "draining", "internal_error")),
    )
    routes.add_api_route(
        "",
        delete_sessions,
        methods=["DELETE"],
        operation_id="delete_sessions",
        responses=problems((*WRITE_CODES, "invalid_argument", "overloaded", "unhealthy", "draining", "internal_error")),
    )
    routes.add_api_route(
        "/{session_id}",
        put,
        methods=["PUT"],
        operation_id="put_session",
        response_model=Session,
        responses={
            201: {"model": Session, "description": "Created."},
            **problems((*_CREATE_CODES, "session_conflict", "session_damaged")),
        },
        response_description="There with the same settings.",
    )
    routes.add_api_route(
        "/{session_id}",
        inspect,
        methods=["GET"],
        operation_id="inspect_session",
        responses=problems(SESSION_CODES),
    )
    routes.add_api_route(
        "/{session_id}",
        change,
        methods=["PATCH"],
        operation_id="update_session",
        responses=problems((*BODY_CODES, *SESSION_CODES, *WRITE_CODES, "model_not_found")),
    )
    routes.add_api_route(
        "/{session_id}",
        delete,
        methods=["DELETE"],
        operation_id="delete_session",
        status_code=204,
        responses=problems((*SESSION_CODES, *WRITE_CODES)),
    )
    return routes


async def create(request: Request, settings: Settings, response: Response) -> Session:
    """Create a session with an id that the server makes."""
    info, _ = await engine_of(request).create(SessionKey.new(caller_of(request).space), settings.record())
    response.headers["Location"] = f"/v1/sessions/{info.id}"
    return Session.of(info)


async def put(request: Request, session_id: str, settings: Settings, response: Response) -> Session:
    """Create a session (201), or confirm that it is there with the same settings (200)."""
    info, created = await engine_of(request).create(key_of(request), settings.record())
    if created:
        response.status_code = 201
        response.headers["Location"] = f"/v1/sessions/{info.id}"
    return Session.of(info)


async def list_sessions(
    request: Request,
    prefix: Annotated[str, Query(description="Only ids that begin so.")] = "",
    label: Annotated[list[str] | None, Query(description="Only with this label, `key:value`; repeatable.")] = None,
    cursor: Annotated[str | None, Query(description="From the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Sessions per page.")] = 100,
    order: Annotated[
        Literal["id", "last_used"], Query(description="By id; or last used first, then those not used since the start.")
    ] = "id",
) -> Response:
    """List sessions, a page at a time."""
    page = await engine_of(request).list_sessions(
        caller_of(request).space, prefix, parse_labels(label or []), cursor, limit, by_use=order == "last_used"
    )
    return await respond_json(
        request,
        lambda raw: {"sessions": [raw(to_json(Session.of(info))) for info in page.sessions], "cursor": page.cursor},
        settings_of(request).max_answer_bytes,
    )


async def inspect(request: Request, session_id: str) -> Session:
    """Inspect a session: settings, length, bytes, residency, times, counters."""
    return Session.of(await engine_of(request).inspect(key_of(request)))


async def change(request: Request, session_id: str, change: Change) -> Session:
    """Change labels, `ttl_s` or the model."""
    return Session.of(await engine_of(request).update(key_of(request), change.record()))


async def delete(request: Request, session_id: str) -> Response:
    """Delete a session; its bytes are gone from every tier."""
    await engine_of(request).delete(key_of(request))
    return Response(status_code=204)


async def delete_sessions(
    request: Request,
    prefix: Annotated[str, Query(description="Those whose ids begin so.")] = "",
    label: Annotated[list[str] | None, Query(description="Those with this label, `key:value`; repeatable.")] = None,
) -> Deleted:
    """Delete all sessions with a label or a prefix, one of which must be given; see `DELETE` of one."""
    labels = parse_labels(label or [])
    return Deleted(deleted=await engine_of(request).delete_sessions(caller_of(request).space, prefix, labels))


def parse_labels(texts: list[str]) -> dict[str, str] | None:
    """`key:value` texts as a mapping; the value may hold further colons."""
    labels: dict[str, str] = {}
    for text in texts:
        key, colon, value = text.partition(":")
        if not colon:
            raise InvalidArgument(f"label is {shorten(text)}; it must be key:value")
        labels[key] = value
    return labels or None
