"""One attend, one append and one second of load, each as a table of parts that add up to the whole."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench import over_http, scene
from bench.figures import machine
from bench.machine import raw_log_rate
from bench.processes import Call
from bench.scene import CHUNK_SIZE, DIM, LENGTH, Scene
from htm_service.kernels.base import Attended, Batch, Kernel, Projections, View, answer_in_steps
from htm_service.records import AppendRequest, CreateRequest, Timing

Part = tuple[str, float]
T = TypeVar("T")


class Profile(NamedTuple):
    """A table: its heading, its unit, and parts whose figures add up to `total`."""

    title: str
    unit: str
    parts: list[Part]

    @property
    def total(self) -> float:
        """The whole."""
        return sum(figure for _, figure in self.parts)


class TimedKernel:
    """A kernel that notes how long each of its calls took."""

    def __init__(self, kernel: Kernel) -> None:
        self.name = kernel.name
        self.seconds: dict[str, list[float]] = {"fold": [], "keys": [], "attend": [], "project": []}
        self.with_keys = False
        """Whether to select first as well, to tell the keys' part of an attend: makes it longer."""
        self._kernel = kernel

    def warm_up(self) -> None:
        """As the kernel."""
        self._kernel.warm_up()

    def fold(self, projections: Projections, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As the kernel."""
        return self._timed("fold", lambda: self._kernel.fold(projections, queries))

    def select(self, batch: Batch) -> Tensor:
        """As the kernel."""
        return self._kernel.select(batch)

    def attend(self, batch: Batch) -> Attended:
        """As the kernel."""
        if self.with_keys:
            self._timed("keys", lambda: self._kernel.select(batch))
        return self._timed("attend", lambda: self._kernel.attend(batch))

    def project(self, projections: Projections, z: Tensor) -> Tensor:
        """As the kernel."""
        return self._timed("project", lambda: self._kernel.project(projections, z))

    def answer(self, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
        """Step by step, each timed."""
        return answer_in_steps(self, projections, queries, view)

    def median_us(self, name: str) -> float:
        """Of all calls since they were last forgotten."""
        return float(np.median(self.seconds[name])) * 1e6

    def forget(self) -> None:
        """Begin anew."""
        for taken in self.seconds.values():
            taken.clear()

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = call()
        self.seconds[name].append(time.perf_counter() - began)
        return result


def one_attend(stage: Scene, port: int, quick: bool) -> Profile:
    """One query of one client, from its request to its answer, in microseconds."""
    query = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    tokens = scene.make_tokens(LENGTH)
    repeats = 50 if quick else 500

    async def in_process() -> list[Part]:
        async with scene.running_engine(stage, "memory://") as engine:
            await scene.fill(engine, "s", tokens)
            kernel = TimedKernel(engine.worker.runner.kernel)
            engine.worker.runner.kernel = kernel
            answer = await engine.attend("s", scene.asks(query))
            scene.check(answer.output, stage.forward(query, tokens))

            async def attend() -> Timing:
                return (await engine.attend("s", scene.asks(query))).timing

            kernel.with_keys = True
            await _medians(attend, repeats)
            keys = kernel.median_us("keys")
            kernel.with_keys = False
            kernel.forget()
            whole, timing = await _medians(attend, repeats)
            fold, chunks, project = (kernel.median_us(name) for name in ("fold", "attend", "project"))
            return [
                ("kernel: fold the query", fold),
                ("kernel: score 625 keys, choose 8", keys),
                ("kernel: attend in 8 chunks of 32", chunks - keys),
                ("kernel: project", project),
                ("device thread: plan, tensors, results", timing.compute_s * 1e6 - fold - chunks - project),
                ("event loop and threads: checks, queue, two hand-overs", whole - timing.compute_s * 1e6),
            ]

    parts = scene.run(in_process())
    binary, _ = over_http.attends(1, query)
    served = over_http.load(stage, port, binary, 0.5 if quick else 3.0, 1)["p50_ms"] * 1e3
    parts.append(("HTTP: sockets, parse, encode, the client", served - sum(figure for _, figure in parts)))
    return Profile("One attend over HTTP, one client", "µs", parts)


def one_append(stage: Scene, port: int, quick: bool) -> Profile:
    """One durable token of one client, in microseconds."""
    embeddings = np.random.default_rng(0).standard_normal((1, DIM), dtype=np.float32)

    async def in_process() -> list[Part]:
        async with scene.running_engine(stage, f"sqlite:///{stage.directory / 'breakdown.sqlite3'}") as engine:
            await engine.create("s", CreateRequest(dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL))

            async def append() -> Timing:
                return (await engine.append("s", AppendRequest(embeddings=embeddings))).timing

            whole, timing = await _medians(append, 50 if quick else 500)
            sync = 1e6 / raw_log_rate(stage.directory, [1] * (50 if quick else 500), embeddings.nbytes)
            store = timing.store_s * 1e6
            return [
                ("a write and fdatasync of a plain file", sync),
                ("SQLite and SQLAlchemy beyond that", store - sync),
                ("event loop and threads: checks, queue, three hand-overs", whole - store),
            ]

    parts = scene.run(in_process())
    call = over_http.appends(torch.from_numpy(embeddings).expand(over_http.CONNECTIONS, DIM))[:1]
    served = over_http.load(stage, port, call, 0.5 if quick else 3.0, 1)["p50_ms"] * 1e3
    parts.append(("HTTP: sockets, parse, encode, the client", served - sum(figure for _, figure in parts)))
    return Profile("One durable append over HTTP, one client", "µs", parts)


def under_load(
    stage: Scene, port: int, what: str, calls: Sequence[Call], quick: bool
) -> tuple[Profile, dict[str, float]]:
    """The processor time of one call of 32 clients, up to all that the cores had; and what the load says."""
    over_http.load(stage, port, calls, 0.5, over_http.CONNECTIONS)
    began, before = time.perf_counter(), _thread_seconds(port)
    found = over_http.load(stage, port, calls, 0.5 if quick else 5.0, over_http.CONNECTIONS)
    after, wall = _thread_seconds(port), time.perf_counter() - began
    number = found["all_requests"]
    spent = {name: (seconds - before.get(name, 0.0)) / number * 1e6 for name, seconds in after.items()}
    parts = [
        ("event loop: HTTP, checks, answers", spent.pop("loop")),
        ("device thread: its share of the kernel, plans, results", spent.pop("device")),
        ("helper threads: their share of the kernel", spent.pop("helpers")),
        ("store thread: SQLite", spent.pop("store")),
        ("the server's other threads", sum(spent.values())),
        ("the load generator", found["load_cpu_share"] / found["per_s"] * 1e6),
    ]
    cores = int(machine()["cores"])
    whole = cores * wall / number * 1e6
    parts.append(("nobody, or what else the machine does", whole - sum(figure for _, figure in parts)))
    return Profile(f"{what} of {over_http.CONNECTIONS} clients, {cores} cores", "µs of processor time", parts), found


def _thread_seconds(port: int) -> dict[str, float]:
    """Processor seconds of the server's threads so far, by kind."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/threads") as answer:
        seconds: dict[str, float] = json.load(answer)
    return seconds


async def _medians(call: Callable[[], Awaitable[Timing]], repeats: int) -> tuple[float, Timing]:
    """Microseconds of the middle one of some calls, and the middle of what each says of its own time."""
    took, timings = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        timings.append(await call())
        took.append(time.perf_counter() - began)
    compute, store = (
        float(np.median([getattr(timing, name) for timing in timings])) for name in ("compute_s", "store_s")
    )
    return float(np.median(took)) * 1e6, Timing(0.0, compute, store)
