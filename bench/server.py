"""htm-service with one endpoint more, `/echo`, which answers with the body it was sent: the ceiling of S2 and S8."""

from __future__ import annotations

import argparse
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.app import create_app
from api.serving import serve
from api.settings import Settings


async def echo(request: Request) -> Response:
    """The body."""
    return Response(await request.body(), media_type="application/octet-stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings(
        port=options.port,
        data=options.data,
        models_dir=options.models_dir,
        memory_budget_bytes=8 << 30,
        log_level="warning",
    )
    app = create_app(settings)
    app.router.routes.insert(0, Route("/echo", echo, methods=["POST"]))
    serve(settings, app)
