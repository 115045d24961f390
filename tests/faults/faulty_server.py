"""`htm-service serve` with calls that make it fail: run as a program, with the flags of `serve`.

POST /faults/shut/PLACE holds whoever comes to a place, /faults/inside/PLACE waits until someone is held there, and
/faults/open/PLACE lets all go on. Places: `device`, the device thread between two batches; `batch`, a batch on the
device; `store`, a group of writes about to be committed, or the closing of the store. POST /faults/die/THREAD raises in
a thread (`device`, `store`, `loader`). A query that begins with POISON makes the kernel fail. GET /faults/queue counts
who waits.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api import serving
from api.app import create_app
from api.cli import build
from api.settings import Settings
from htm_service.engine import Engine
from htm_service.threads.batcher import Batcher
from htm_service.writes import compaction

POISON = 13.0


class Gate:
    """Open at first."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_held = threading.Event()

    def go_through(self) -> None:
        """Wait as long as it is shut."""
        if not self.is_open.is_set():
            self.is_held.set()
            self.is_open.wait()
            self.is_held.clear()

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, behind this gate."""

        def call_later(*arguments: Any, **options: Any) -> Any:
            self.go_through()
            return call(*arguments, **options)

        return call_later


class Faults:
    """The faults of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gates = {"device": Gate(), "batch": Gate(), "store": Gate()}
        store, reader = engine.store, engine.worker.runner
        store.write = self.gates["store"].before(store.write)  # type: ignore[method-assign]
        store.close = self.gates["store"].before(store.close)  # type: ignore[method-assign]
        reader.run = self.gates["batch"].before(poisoned(reader.run))  # type: ignore[method-assign]
        self.futures: list[asyncio.Future[Any]] = []
        self.num_posted = self.num_done = 0
        self.count(engine.worker.queue)
        self.count(engine.committer.queue)

    def count(self, batcher: Batcher[Any, Any]) -> None:
        """Note what is submitted to a queue and posted to it from now on."""
        submit, post = batcher.submit, batcher.post

        def submit_and_note(item: Any, **how: Any) -> asyncio.Future[Any]:
            self.futures.append(future := submit(item, **how))
            return future

        def post_and_note(action: Callable[[], None]) -> bool:
            def act() -> None:
                self.num_done += 1
                action()

            self.num_posted += 1
            return post(act)

        batcher.submit = submit_and_note  # type: ignore[method-assign]
        batcher.post = post_and_note  # type: ignore[method-assign]

    def shut(self, place: str) -> None:
        gate = self.gates[place]
        gate.is_open.clear()
        if place == "device":
            self.engine.worker.queue.post(gate.go_through)

    def die(self, thread: str) -> None:
        def fail() -> None:
            raise RuntimeError(f"a fault in the {thread} thread")

        if thread == "loader":
            self.engine.worker.loader.fetch(None)  # type: ignore[arg-type]
        else:
            worker = self.engine.worker if thread == "device" else self.engine.committer
            worker.queue.post(fail)

    async def do(self, request: Request) -> Response:
        """One of the calls of this module's head."""
        what, where = request.path_params["what"], request.path_params["where"]
        if what == "shut":
            self.shut(where)
        elif what == "inside":
            assert await asyncio.to_thread(self.gates[where].is_held.wait, 20), f"nobody is held at {where}"
        elif what == "open":
            self.futures = [future for future in self.futures if not future.done()]
            self.gates[where].is_open.set()
        else:
            self.die(where)
        return Response()

    async def queue(self, request: Request) -> Response:
        """How many wait for the device and for the store, how many of both have gone; what else the device shall do."""
        counts: dict[str, int] = {}
        for name, batcher in (("device", self.engine.worker.queue), ("store", self.engine.committer.queue)):
            counts[name] = batcher.num_waiting
        counts["gone"] = sum(future.cancelled() for future in self.futures)
        counts["actions"] = self.num_posted - self.num_done
        return JSONResponse(counts)


def poisoned(run: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """The reader's `run`, which fails as a whole when one of its queries is poison."""

    def run_or_fail(reads: Sequence[Any]) -> Any:
        if any(read.request.queries[0, 0] == POISON for read in reads):
            raise RuntimeError("the kernel met poison")
        return run(reads)

    return run_or_fail


def create_faulty_app(settings: Settings) -> FastAPI:
    """The app with the calls of this module's head."""
    app = create_app(settings)
    made: list[Faults] = []

    def faults() -> Faults:
        if not made:
            made.append(Faults(app.state.engine))
        return made[0]

    async def do(request: Request) -> Response:
        return await faults().do(request)

    async def queue(request: Request) -> Response:
        return await faults().queue(request)

    app.router.routes.insert(0, Route("/faults/queue", queue))
    app.router.routes.insert(0, Route("/faults/{what}/{where}", do, methods=["POST"]))
    return app


def main(arguments: list[str]) -> None:
    """`htm-service` with these arguments."""
    compaction.INTERVAL_S = 3_600.0  # what it asks of the device and the store would be held and counted too
    vars(serving)["create_app"] = create_faulty_app
    build()(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
