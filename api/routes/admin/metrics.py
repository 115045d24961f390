"""/metrics, for Prometheus. Does not know: what is measured where."""

from __future__ import annotations

import contextlib

from fastapi import APIRouter
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from api.metrics import EngineTotals, exposition
from api.openapi import problems
from api.routes.context import JsonRoute, engine_of, metrics_of
from htm_service.errors import HTMError

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def router() -> APIRouter:
    """The route of this module."""
    routes = APIRouter(tags=["server"], route_class=JsonRoute)
    routes.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        operation_id="metrics",
        response_class=Response,
        responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}, **problems(("internal_error",))},
    )
    return routes


async def metrics(request: Request) -> Response:
    """What the server measures, as Prometheus reads it; without the engine's totals when its store fails."""
    engine = engine_of(request)
    collectors: list[Collector] = [metrics_of(request).registry, engine.metrics.registry]
    with contextlib.suppress(HTMError):
        collectors.append(EngineTotals(await engine.info()))
    return Response(exposition(collectors), media_type=MEDIA_TYPE)
