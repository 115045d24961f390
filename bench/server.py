"""htm-service with two endpoints more: `/echo` answers with the body it was sent, the ceiling of S2 and S8; `/threads`
says how many seconds of processor time each kind of thread has taken."""

from __future__ import annotations

import argparse
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.app import create_app
from api.serving import serve
from api.settings import Settings
from bench import machine


async def echo(request: Request) -> Response:
    """The body."""
    return Response(await request.body(), media_type="application/octet-stream")


async def threads(_: Request) -> JSONResponse:
    """See `machine.thread_seconds`."""
    return JSONResponse(machine.thread_seconds())


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
    app.router.routes[:0] = [Route("/echo", echo, methods=["POST"]), Route("/threads", threads)]
    serve(settings, app)
