"""htm-service with endpoints more: an echo, what its threads took, and, when timed, what the parts of a request took.

`/echo` answers with the body it was sent, the ceiling of S2 and S8; `/threads` says how many seconds of processor time
each kind of thread has taken; with `--timed`, `/timings` says how many seconds parts of the server have; with
`--switched`, `/switch` has it go on with or without something, for S21 and A1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import Tensor

from api.app import App, create_app
from api.auth import ANYONE, Caller, Refusal, refusal
from api.serving import serve
from api.settings import Settings
from bench import machine
from htm_service.engine import Engine
from htm_service.kernels.base import Attended, Kernel, Projections, View, answer_in_steps

P = ParamSpec("P")
T = TypeVar("T")


async def echo(request: Request) -> Response:
    """The body."""
    return Response(await request.body(), media_type="application/octet-stream")


async def threads(_: Request) -> JSONResponse:
    """See `machine.thread_seconds`."""
    return JSONResponse(machine.thread_seconds())


class Timings:
    """Seconds that parts of this server took since it was last asked; for one request at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, name: str, call: Callable[P, T]) -> Callable[P, T]:
        """The call, timed."""

        def timed(*args: P.args, **options: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.add(name, time.perf_counter() - began)

        return timed

    def add(self, name: str, seconds: float) -> None:
        """Count them."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    async def answer(self, request: Request) -> JSONResponse:
        """All of them; they begin anew."""
        self.watch_engine(request.app.state.engine)
        seconds, self.seconds = self.seconds, {}
        return JSONResponse(seconds)

    def watch(self, app: App) -> None:
        """Time the app's answers."""
        front = app.front

        async def timed(scope: Scope, receive: Receive, send: Send) -> None:
            began = time.perf_counter()
            await front(scope, receive, send)
            if scope["type"] == "http" and scope["path"] != "/timings":
                self.add("server", time.perf_counter() - began)

        app.front = timed

    def watch_engine(self, engine: Engine) -> None:
        """Time its store's writes and its kernel, from the first time that somebody asks."""
        if not isinstance(engine.worker.runner.kernel, TimedKernel):
            engine.store.write = self.of("write", engine.store.write)  # type: ignore[method-assign]
            engine.worker.runner.kernel = TimedKernel(engine.worker.runner.kernel, self)  # searches keep theirs


class Switch:
    """Parts of this server that can be left out, for a while."""

    def __init__(self, app: App, what: str) -> None:
        self._app = app
        self._what = what

    async def turn(self, request: Request) -> JSONResponse:
        """Leave them out from now on, or not; how far the server is."""
        state, is_on = self._app.state, request.query_params["on"] == "1"
        engine: Engine = state.engine
        if self._what == "accounts":
            engine.accounts.max_recalls = engine.config.recalls_per_session if is_on else 0
        else:  # what stands in an object goes before its class's
            for owner, name, nothing in (
                (state.auth, "admit", _admit_anyone),
                (state.metrics, "count", _nothing),
                (engine.feed, "tell", _nothing),
            ):
                vars(owner).pop(name, None) if is_on else setattr(owner, name, nothing)
        attends = (await engine.info()).totals["attends"]
        loop_s = machine.thread_seconds()["loop"]
        return JSONResponse({"at": time.perf_counter(), "attends": attends, "loop_s": loop_s})


def _nothing(*_: object) -> None:
    """What is left out."""


async def _admit_anyone(scope: Scope, _: object) -> Caller | Refusal:
    """As a server without keys does."""
    return refusal(scope) or ANYONE


class TimedKernel:
    """A kernel, step by step, each step timed."""

    def __init__(self, kernel: Kernel, timings: Timings) -> None:
        self.name = f"timed {kernel.name}"
        self.warm_up = kernel.warm_up
        self.select = kernel.select
        self.fold = timings.of("kernel.fold", kernel.fold)
        self.attend = timings.of("kernel.attend", kernel.attend)
        self.project = timings.of("kernel.project", kernel.project)

    def answer(self, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
        """In steps."""
        return answer_in_steps(self, projections, queries, view)


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--switched", choices=["guard", "accounts"], help="what `/switch` leaves out")
    parser.add_argument("--timed", action="store_true", help="with `/timings`, for one client at a time")
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
    assert isinstance(app, App)
    if options.switched:
        app.router.routes.insert(0, Route("/switch", Switch(app, options.switched).turn))
    if options.timed:
        timings = Timings()
        app.router.routes.insert(0, Route("/timings", timings.answer))
        timings.watch(app)
    serve(settings, app)


if __name__ == "__main__":
    main()
