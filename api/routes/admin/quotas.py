"""What namespaces may hold. Does not know: how that is kept to."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request

from api.openapi import BODY_CODES, WRITE_CODES, problems
from api.routes.context import JsonRoute, caller_of, engine_of
from api.schemas.bodies import QuotaBody
from api.schemas.views import Quota

_CODES = ("invalid_argument", "unhealthy", "draining", "internal_error")

Limits = Annotated[QuotaBody, Body(openapi_examples={"usual": {"value": {"max_sessions": 100, "max_tokens": 1000000}}})]


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/quotas/{namespace}", tags=["keys"], route_class=JsonRoute)
    routes.add_api_route("", show, methods=["GET"], operation_id="get_quota", responses=problems(_CODES))
    routes.add_api_route(
        "",
        put,
        methods=["PUT"],
        operation_id="put_quota",
        responses=problems((*BODY_CODES, *WRITE_CODES, *_CODES, "overloaded")),
    )
    return routes


async def show(request: Request, namespace: str) -> Quota:
    """Tell what a namespace may hold, and what it holds."""
    return Quota.of(await engine_of(request).quota(caller_of(request).space_for(namespace)))


async def put(request: Request, namespace: str, limits: Limits) -> Quota:
    """Say what a namespace may hold from now on; what is left out has no limit. What it holds already stays."""
    return Quota.of(await engine_of(request).set_quota(limits.record(namespace)))
