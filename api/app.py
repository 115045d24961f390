"""The composition root: settings to store, engine, routes, one app. Does not know: sockets and signals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api import errors, openapi
from api.auth import Auth
from api.disconnect import Watch
from api.metrics import Metrics
from api.middleware import Front
from api.routes import branches, events, inspection, pages, server, sessions, transfers
from api.routes.admin import keys, metrics, models, quotas
from api.routes.hot import batch, calls
from api.routes.hot import openapi as hot_openapi
from api.settings import Settings
from api.tracing import Traces
from api.wire.body import Room
from htm_service.config import EngineConfig
from htm_service.errors import HTMError
from htm_service.version import __version__

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none
    from htm_service.engine import Engine

CORS_HEADERS = [
    *("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match"),
    *("X-HTM-Namespace", "X-Request-Id"),
]
CORS_EXPOSED = ["ETag", "Location", "Retry-After", "Server-Timing", "X-Batch-Size", "X-Model-Hash", "X-Request-Id"]
"""Headers that pages of other origins may send, and read."""
DESCRIPTION = "A memory server for agents: chunked memories, Hierarchical Transformer Memory attention over REST."


class App(FastAPI):
    """FastAPI behind one middleware of ours."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        await self.front(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """The framework's, without the outermost that answers when code fails: `front` does that, for all alike."""
        stack = super().build_middleware_stack()
        assert isinstance(stack, ServerErrorMiddleware)
        return stack.app


def create_app(
    settings: Settings, *, engine: Engine | None = None, clock: Callable[[], float] | None = None
) -> FastAPI:
    """The app. It opens and closes store and engine with its lifespan, unless `engine` is given (and running).

    `clock` is the engine's.
    """

    traces = None if settings.otlp_endpoint is None else Traces(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if traces is not None:
                stack.push_async_callback(asyncio.to_thread, traces.close)
            app.state.engine = engine or await stack.enter_async_context(running_engine(settings, clock))
            yield

    app = App(
        title="htm-service",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would name whatever host the client named
        lifespan=lifespan,
        exception_handlers={
            HTMError: errors.on_domain_error,
            RequestValidationError: errors.on_validation_error,
            HTTPException: errors.on_http_error,
        },
    )
    app.state.settings = settings
    app.state.room = Room(settings.max_held_bytes)
    app.state.watch = Watch()
    app.state.metrics = Metrics()
    if engine is not None:  # in-process tests need no lifespan
        app.state.engine = engine
    hot_routes = [*calls.routes(), *batch.routes()]
    app.state.auth = Auth(settings.admin_key, insecure=settings.insecure, metrics_open=settings.metrics_open)
    app.front = Front(super(App, app).__call__, hot_routes, app, app.state.metrics, traces, app.state.auth)
    if settings.origins:
        app.front = CORSMiddleware(
            app.front,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=CORS_HEADERS,
            expose_headers=CORS_EXPOSED,
        )
    app.router.routes.extend(hot_routes)  # for what the short way leaves: other methods are answered 405
    app.include_router(sessions.router())
    app.include_router(transfers.router())
    app.include_router(branches.router())
    app.include_router(inspection.router())
    app.include_router(events.router())
    app.include_router(models.router())
    app.include_router(keys.router())
    app.include_router(quotas.router())
    app.include_router(server.router())
    app.include_router(metrics.router())
    app.router.routes.extend(pages.routes())

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi.build(app, hot_openapi.calls())
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def running_engine(settings: Settings, clock: Callable[[], float] | None) -> AsyncIterator[Engine]:
    """Store and engine, opened and started, then drained and closed.

    Raises StoreUnavailable (another server has the data, a newer version wrote it), OSError, HTMError.
    """
    from htm_service.engine import Engine
    from storage.resolve import open_store

    store = await asyncio.to_thread(open_store, settings.url_of_store, lease_s=settings.lease_seconds)
    try:
        engine = Engine(engine_config(settings), store, clock=clock)
        try:
            await engine.start()
            yield engine
        finally:
            await engine.close(settings.drain_seconds)
    finally:
        await asyncio.to_thread(store.close)


def engine_config(settings: Settings) -> EngineConfig:
    """The part of the settings that is the engine's."""
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        memory_budget_bytes=settings.memory_budget_bytes,
        max_waiting=settings.max_waiting,
        max_batch_products=settings.max_batch_products,
        max_answer_bytes=settings.max_answer_bytes,
        default_timeout_s=settings.default_timeout_ms / 1e3,
        oversample=settings.oversample,
        payload_cache_bytes=settings.payload_cache_bytes,
        recalls_per_session=settings.recalls_per_session,
        max_recall_bytes=settings.max_recall_bytes,
        create_on_append=settings.create_on_append,
        stuck_s=settings.stuck_seconds,
        models_dir=settings.directory_of_models,
        kernel_cache=settings.kernel_cache,
        retrieval_summary_scale=settings.retrieval_summary_scale,
        retrieval_attention_scale=settings.retrieval_attention_scale,
    )
