"""`:memory:`: the server's app in this process, with a store in memory; for tests and notebooks.

Imports the server only when it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

import httpx

ADDRESS = ":memory:"


def make_app() -> Any:
    """The app, not yet started."""
    try:
        from api.app import create_app
        from api.settings import Settings
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{ADDRESS} runs the server in this process: install htm-service ({error})") from error
    return create_app(Settings(store_url="memory://"))


class AsyncApp(httpx.AsyncBaseTransport):
    """Runs the app on the caller's loop; started by the first request, stopped by `aclose`.

    The lifespan runs in a task of its own, because it must be left in the task that entered it.
    """

    def __init__(self) -> None:
        self._app = make_app()
        self._transport = httpx.ASGITransport(self._app)
        self._stop = asyncio.Event()
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Start the app if need be, then pass the request on."""
        if self._task is None:
            self._task = asyncio.create_task(self._live())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait({started, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            self._task.result()  # raises what kept the app from starting
        return await self._transport.handle_async_request(request)

    async def aclose(self) -> None:
        """Stop the app. Safe to call twice."""
        if self._task is not None:
            self._stop.set()
            await self._task

    async def _live(self) -> None:
        async with self._app.router.lifespan_context(self._app):
            self._started.set()
            await self._stop.wait()


class SyncApp(httpx.BaseTransport):
    """The same for the sync client: an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="htm-in-process", daemon=True)
        self._thread.start()
        self._app = self._run(self._make())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass the request to the app, with its body read whole."""

        async def call() -> httpx.Response:
            asked = httpx.Request(
                request.method, request.url, headers=request.headers, content=request.content, extensions={}
            )
            response = await self._app.handle_async_request(asked)
            content = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=content)

        request.read()
        response: httpx.Response = self._run(call())
        return response

    def close(self) -> None:
        """Stop the app and its loop. Safe to call twice."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._run(self._app.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _make(self) -> AsyncApp:
        return AsyncApp()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
