"""The server itself: info, and the two health calls. Does not know: sessions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from api.openapi import problems
from api.routes.context import JsonRoute, caller_of, engine_of, settings_of
from api.schemas.views import Caller, Health, Info
from htm_service.errors import Draining, Unhealthy


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(tags=["server"], route_class=JsonRoute)
    routes.add_api_route(
        "/v1/info",
        info,
        methods=["GET"],
        operation_id="info",
        responses=problems(("unhealthy", "invalid_argument", "internal_error")),
    )
    routes.add_api_route("/livez", alive, methods=["GET"], operation_id="livez")
    routes.add_api_route(
        "/readyz",
        ready,
        methods=["GET"],
        operation_id="readyz",
        responses=problems(("unhealthy", "draining")),
    )
    return routes


async def info(request: Request) -> Info:
    """Describe the server: version, device and dtype with the reason for both, limits, totals."""
    who = caller_of(request)
    found = await engine_of(request).info(who.sees)
    settings = settings_of(request)
    own = {"max_body_bytes": settings.max_body_bytes, "max_json_body_bytes": settings.max_json_body_bytes}
    return Info(
        version=found.version,
        device=found.device,
        device_reason=found.device_reason,
        dtype=found.dtype,
        dtype_reason=found.dtype_reason,
        kernel=found.kernel,
        kernel_reason=found.kernel_reason,
        models=list(found.models),
        limits={**found.limits, **own},
        totals=dict(found.totals),
        caller=Caller(role=who.role, opens=who.namespace, namespace=who.space) if who.is_known else None,
    )


async def alive() -> Health:
    """Tell that the process answers; for liveness probes."""
    return Health(status="alive")


async def ready(request: Request) -> Health:
    """Tell whether the server can do its work; for readiness probes."""
    engine = engine_of(request)
    reason = engine.unhealthy_reason()
    if reason is not None:
        raise Unhealthy(reason)
    if engine.is_draining:
        raise Draining("the server is stopping and takes no new work")
    return Health(status="ready")
