"""`:memory:`: the server's app in this process, with a store in memory; for tests and notebooks.

Imports the server only when it is asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import httpx

ADDRESS = ":memory:"
STOP_S = 10.0


def make_app() -> Any:
    """The app, not yet started. Raises RuntimeError when the server is not installed."""
    try:
        from api.app import create_app
        from api.settings import Settings
    except ImportError as error:  # not ModuleNotFoundError: a stranger's `api` has no `create_app`
        raise RuntimeError(
            f"{ADDRESS} runs the server in this process and needs it: pip install htm-client[server] ({error})"
        ) from error
    return create_app(Settings(store_url="memory://", api_key=None, api_key_file=None))  # nobody else can reach it


class AsyncApp(httpx.AsyncBaseTransport):
    """Runs the app on the caller's loop; started by the first request, stopped by `aclose`.

    The lifespan runs in a task of its own, because it must be left in the task that entered it.
    """

    def __init__(self) -> None:
        self._app = make_app()
        self._transport = httpx.ASGITransport(self._app)
        self._stop = asyncio.Event()
        self._started: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Start the app if need be, then pass the request on. Raises what kept the app from starting."""
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._live(self._started))
        await asyncio.shield(self._started)  # a cancelled request does not stop the others' start
        return await self._transport.handle_async_request(request)

    async def aclose(self) -> None:
        """Stop the app. Safe to call twice."""
        if self._task is not None:
            self._stop.set()
            await self._task

    async def _live(self, started: asyncio.Future[None]) -> None:
        try:
            async with self._app.router.lifespan_context(self._app):
                started.set_result(None)
                await self._stop.wait()
        except Exception as error:
            if started.done():
                raise  # while stopping: for `aclose`
            started.set_exception(error)


class SyncApp(httpx.BaseTransport):
    """The same for the sync client: an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._app = AsyncApp()  # before the thread, which nobody would stop if this fails
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="htm-in-process", daemon=True)
        self._thread.start()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass the request to the app, with its body and its answer's read whole."""
        request.read()
        status, headers, content = self._run(self._call(request))
        return httpx.Response(status, headers=headers, content=content)

    def close(self) -> None:
        """Stop the app and its loop. Safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._app.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _call(self, request: httpx.Request) -> tuple[int, httpx.Headers, bytes]:
        asked = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
        response = await self._app.handle_async_request(asked)
        return response.status_code, response.headers, await response.aread()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
