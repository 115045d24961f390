"""How the time of an attend grows with each thing it depends on, all others as in S1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import over_http, scene
from bench.scene import CHUNK_SIZE, DIM, LENGTH, Scene, named
from htm_service.engine import Engine
from htm_service.records import SearchRequest


class Growth(NamedTuple):
    """A table: what is varied, what is shown, and pairs of both."""

    what: str
    unit: str
    points: list[tuple[int, float]]


async def in_process(stage: Scene, quick: bool) -> list[Growth]:
    """Milliseconds of the middle one of some attends, in this process."""
    repeats = 20 if quick else 200
    growths = []
    async with scene.running_engine(stage, "memory://") as engine:
        points = []
        for length in (2_000, 20_000) if quick else (2_000, 20_000, 200_000, 1_000_000):
            await scene.fill(engine, f"n{length}", scene.make_tokens(length))
            points.append((length, await _median_ms(engine, [f"n{length}"], repeats)))
        growths.append(Growth("n, tokens of the session", "ms per attend", points))

        points = [(num, await _median_ms(engine, ["n20000"], repeats, num_queries=num)) for num in (1, 4, 16, 64, 128)]
        growths.append(Growth("Q, queries of the attend", "ms per attend", points))

        points = [
            (num, await _median_ms(engine, ["n20000"], repeats, num_queries=num, stops=True)) for num in (1, 16, 128)
        ]
        growths.append(Growth("Q, each with a `stop` of its own", "ms per attend", points))

        points = [(k, await _median_ms(engine, ["n20000"], repeats, top_k=k)) for k in (1, 8, 32, 128, 256)]
        growths.append(Growth("k, chunks taken", "ms per attend", points))

        points = []
        for dim in (128, 256, 512, 1_024):
            await scene.fill(engine, f"d{dim}", scene.make_tokens(LENGTH, dim), "retrieval")
            points.append((dim, await _median_ms(engine, [f"d{dim}"], repeats, dim=dim)))
        growths.append(Growth("D, width, with the model `retrieval` (one head)", "ms per attend", points))

        names = [f"s{number}" for number in range(4 if quick else 64)]
        for name in names:
            await scene.fill(engine, name, scene.make_tokens(LENGTH))
        points = []
        for num in (1, 4) if quick else (1, 4, 16, 64):
            points.append((num, await _median_ms(engine, names[:num], repeats // 4) / num))
        growths.append(
            Growth("sessions asked at once, one query each", "ms per attend, all of them over their number", points)
        )
    return growths


async def of_searches(stage: Scene, quick: bool) -> list[Growth]:
    """The same of searches with `retrieval`, over tokens that come in clusters of 500."""
    repeats = 20 if quick else 200
    growths = []
    async with scene.running_engine(stage, "memory://") as engine:

        async def fill(name: str, length: int, dim: int = DIM) -> None:
            await scene.fill(engine, name, scene.make_clustered(length, dim), "retrieval")
            while _num_sketched(engine, name) < length // CHUNK_SIZE:
                await engine.search(named(name), SearchRequest(np.zeros(dim, np.float32)))

        points = []
        for length in (2_000, 20_000) if quick else (2_000, 20_000, 200_000):
            await fill(f"n{length}", length)
            points.append((length, await _median_search_ms(engine, [f"n{length}"], repeats)))
        growths.append(Growth("N, tokens of the session", "ms per search", points))
        for what, name, values in (
            ("n, tokens wanted", "num_wanted", (1, 8, 64, 512)),
            ("`oversample`, n 8", "oversample", (1, 4, 16, 64)),
        ):
            points = [(num, await _median_search_ms(engine, ["n20000"], repeats, **{name: num})) for num in values]
            growths.append(Growth(what, "ms per search", points))
        points = [
            (num, await _median_search_ms(engine, ["n20000"], repeats, num_queries=num)) for num in (1, 4, 16, 64)
        ]
        growths.append(Growth("Q, queries of the search", "ms per search", points))
        points = []
        for dim in (128, 256, 512, 1_024):
            await fill(f"d{dim}", LENGTH, dim)
            points.append((dim, await _median_search_ms(engine, [f"d{dim}"], repeats, dim=dim)))
        growths.append(Growth("D, width", "ms per search", points))
        points = [(exact, await _median_search_ms(engine, ["n20000"], repeats, exact=bool(exact))) for exact in (0, 1)]
        growths.append(Growth("`exact`", "ms per search", points))
    return growths


def _num_sketched(engine: Engine, name: str) -> int:
    """Chunks of a session that have sketches."""
    (session,) = [session for session in engine.directory.sessions() if session.id == name]
    chunks = session.resident.chunks
    return 0 if chunks is None or chunks.sketches is None else chunks.sketches.num_known


async def _median_search_ms(
    engine: Engine, sessions: Sequence[str], repeats: int, *, num_queries: int = 1, dim: int = DIM, **fields: Any
) -> float:
    """Of searching all the sessions at once, for neighbours of their tokens."""
    queries = scene.make_clustered(LENGTH, dim)[:: LENGTH // num_queries][:num_queries] + 0.02 * torch.randn(
        num_queries, dim
    )
    request = SearchRequest(queries.numpy(), **{"num_wanted": 8, **fields})
    took: list[float] = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        await asyncio.gather(*(engine.search(named(session), request) for session in sessions))
        took.append(time.perf_counter() - began)
    return float(np.median(took[3:])) * 1e3


def over_connections(stage: Scene, port: int, sessions: int, quick: bool) -> Growth:
    """Attends per second by the number of clients."""
    binary, _ = over_http.attends(sessions, torch.randn(over_http.NUM_QUERIES, DIM))
    points = []
    for number in (1, 32) if quick else (1, 4, 16, 32, 64, 128):
        found = over_http.load(stage, port, binary, 0.5 if quick else 3.0, number)
        points.append((number, found["per_s"]))
    return Growth(f"connections, {sessions} sessions, over HTTP", "attends per second", points)


async def _median_ms(
    engine: Engine,
    sessions: Sequence[str],
    repeats: int,
    *,
    num_queries: int = 1,
    top_k: int | None = None,
    dim: int = DIM,
    stops: bool = False,
) -> float:
    """Of asking all the sessions at once; with `stops` each query sees to another position."""
    request = replace(scene.asks(torch.randn(num_queries, dim)), top_k=top_k)
    if stops:
        ends = tuple(range(LENGTH - num_queries + 1, LENGTH + 1))
        request = replace(request, stop=LENGTH, stops=ends)
    took: list[float] = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        await asyncio.gather(*(engine.attend(named(session), request) for session in sessions))
        took.append(time.perf_counter() - began)
    return float(np.median(took[3:])) * 1e3


def as_markdown(growth: Growth) -> str:
    """A table of one row."""

    def cells(values: Sequence[Any]) -> str:
        return "| " + " | ".join(map(str, values)) + " |"

    head = cells([growth.what, *(f"{at:,}" for at, _ in growth.points)])
    row = cells(
        [growth.unit, *(f"{figure:,.3g}" if figure < 1000 else f"{figure:,.0f}" for _, figure in growth.points)]
    )
    return "\n".join([head, cells(["---"] * (len(growth.points) + 1)), row])
