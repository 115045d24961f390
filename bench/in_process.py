"""S4 to S7 and S10 to S12: the engine in this process, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine, scene
from bench.figures import Figure, say
from bench.scene import CHUNK_SIZE, DIM, HEADS, LENGTH, TOP_K, Scene, named
from htm_service.engine import Engine
from htm_service.records import AppendRequest, CreateRequest

NUM_WRITERS = 32
LENGTHS = (2_000, 20_000, 200_000, 2_000_000)
SMALL_DIM = 128


async def attends_many(stage: Scene, quick: bool) -> Figure:
    """S4: 128 queries at once."""
    tokens, queries = scene.make_tokens(LENGTH), torch.randn(128, DIM)
    async with scene.running_engine(stage, "memory://") as engine:
        await scene.fill(engine, "s", tokens)
        answer = await engine.attend(named("s"), scene.asks(queries))
        scene.check(answer.output, stage.forward(queries, tokens))
        ours = await _median(lambda: engine.attend(named("s"), scene.asks(queries)), 5 if quick else 30)
    naive = machine.median_of(1 if quick else 3, lambda: stage.forward(queries, tokens))
    measured = {"ours_ms": ours * 1e3, "htm_pytorch_ms": naive * 1e3}
    return Figure("S4", "in process, Q 128, beside htm-pytorch", naive / ours, 30, measured=measured)


async def attends_long(stage: Scene, quick: bool) -> Figure:
    """S5: one query over 200,000 tokens."""
    length = LENGTH if quick else 200_000
    tokens, queries = scene.make_tokens(length), torch.randn(1, DIM)
    async with scene.running_engine(stage, "memory://") as engine:
        await scene.fill(engine, "s", tokens)
        answer = await engine.attend(named("s"), scene.asks(queries))
        scene.check(answer.output, stage.forward(queries, tokens))
        ours = await _median(lambda: engine.attend(named("s"), scene.asks(queries)), 50)
    naive = machine.median_of(5, lambda: stage.forward(queries, tokens))
    measured = {"ours_ms": ours * 1e3, "htm_pytorch_ms": naive * 1e3, "n": length}
    return Figure("S5", "in process, Q 1, n 200,000, beside htm-pytorch", naive / ours, 60, measured=measured)


async def attends_batch(stage: Scene, quick: bool) -> Figure:
    """S6: 64 queries on 64 sessions, beside what memory and arithmetic allow."""
    num = 16 if quick else 64
    tokens = scene.make_tokens(LENGTH)
    async with scene.running_engine(stage, "memory://") as engine:
        for number in range(num):
            await scene.fill(engine, f"s{number}", tokens)
        queries = torch.randn(num, 1, DIM)
        answer = await engine.attend(named("s3"), scene.asks(queries[3]))
        scene.check(answer.output, stage.forward(queries[3], tokens))

        def all_at_once() -> Awaitable[Any]:
            return asyncio.gather(*(engine.attend(named(f"s{at}"), scene.asks(queries[at])) for at in range(num)))

        ours = await _median(all_at_once, 5 if quick else 30)
    num_keys = -(-LENGTH // CHUNK_SIZE)
    num_read = 4 * DIM * (num_keys + TOP_K * CHUNK_SIZE)
    inner = stage.oracle.attn.to_q.out_features
    num_products = DIM * (num_keys + 2 * HEADS * TOP_K * CHUNK_SIZE + DIM + 4 * inner)
    at_memory = num * num_read / machine.read_bandwidth()
    at_arithmetic = num * num_products / machine.sgemm_rate()
    measured = {"ours_ms": ours * 1e3, "memory_ms": at_memory * 1e3, "arithmetic_ms": at_arithmetic * 1e3}
    figure = max(at_memory, at_arithmetic) / ours
    return Figure("S6", f"{num} queries on {num} sessions, beside the machine's limit", figure, 0.5, measured=measured)


async def appends(stage: Scene, quick: bool) -> Figure:
    """S7: durable appends of one token by 32 writers, beside a raw log that is synced as often."""
    seconds = 1.0 if quick else 5.0
    async with scene.running_engine(stage, f"sqlite:///{stage.directory / 's7.sqlite3'}") as engine:
        for number in range(NUM_WRITERS):
            await engine.create(named(f"w{number}"), CreateRequest(dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL))
        embeddings = np.random.default_rng(0).standard_normal((1, DIM), dtype=np.float32)
        await _write(engine, embeddings, 0.5)
        before, taken = await _num_commits(engine), machine.thread_seconds()
        ours = await _write(engine, embeddings, seconds)
        num_groups, now = await _num_commits(engine) - before, machine.thread_seconds()
        for number in range(NUM_WRITERS):
            kept = await engine.read(named(f"w{number}"), 0, 1, embeddings=True, payloads=False)
            assert kept.embeddings is not None and np.array_equal(kept.embeddings, embeddings)
    group = max(1, round(ours * seconds / num_groups))
    raw = machine.raw_log_rate(stage.directory, [group] * num_groups, embeddings.nbytes)
    measured = {"ours_per_s": ours, "raw_per_s": raw, "mean_group": group}
    for kind in ("loop", "device", "store"):
        measured[f"{kind}_cpu_us"] = (now[kind] - taken[kind]) / (ours * seconds) * 1e6
    return Figure("S7", "durable appends in process, beside a raw log", ours / raw, 0.5, measured=measured)


async def restore(stage: Scene, quick: bool) -> list[Figure]:
    """S10, S12: a cold session of 1,000,000 x 128 until its first answer; what it takes in memory and on disk.

    The answer needs its keys, which are kept, and the pages it takes; the second measurement is without kept keys.
    """
    length = 100_000 if quick else 1_000_000
    path = stage.directory / "s10.sqlite3"
    tokens = scene.make_tokens(length, SMALL_DIM)
    async with scene.running_engine(stage, f"sqlite:///{path}") as engine:
        await scene.fill(engine, "s", tokens, "retrieval")
        before = await engine.attend(named("s"), scene.asks(tokens[:1]))
        arena = (await engine.inspect(named("s"))).device_bytes / tokens.nbytes

    async def first_answer() -> float:
        async with scene.running_engine(stage, f"sqlite:///{path}") as engine:
            began = time.perf_counter()
            after = await engine.attend(named("s"), scene.asks(tokens[:1]))
            took = time.perf_counter() - began
            assert np.array_equal(before.output, after.output)
            return took

    ours = await first_answer()
    reading = machine.median_of(3, lambda: _read_blocks(path))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM summaries")
    measured: dict[str, Any] = {"ours_s": ours, "one_pass_s": reading, "n": length}
    measured["without_kept_keys_s"] = await first_answer()
    disk = path.stat().st_size / tokens.nbytes
    return [
        Figure(
            "S10", "first answer of a cold session, beside reading its bytes", reading / ours, 0.5, measured=measured
        ),
        Figure("S12", "arena bytes per token, of D x itemsize", arena, 1.10, at_most=True),
        Figure("S12", "disk bytes per token, of D x itemsize, large appends", disk, 1.25, at_most=True),
        await _disk_of_single_appends(stage, 2_000 if quick else 20_000),
    ]


async def _disk_of_single_appends(stage: Scene, length: int) -> Figure:
    path = stage.directory / "s12.sqlite3"
    tokens = scene.make_tokens(length)
    async with scene.running_engine(stage, f"sqlite:///{path}") as engine:
        for number in range(NUM_WRITERS):
            await engine.create(named(f"w{number}"), CreateRequest(dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL))

        async def stream(number: int) -> None:
            for token in tokens[number::NUM_WRITERS]:
                await engine.append(named(f"w{number}"), AppendRequest(embeddings=token[None].numpy()))

        await asyncio.gather(*(stream(number) for number in range(NUM_WRITERS)))
    disk = path.stat().st_size / tokens.nbytes
    return Figure("S12", "disk bytes per token, of D x itemsize, one by one", disk, 1.25, at_most=True)


async def latency(stage: Scene, quick: bool) -> Figure:
    """S11: how the time of one attend grows with the session, beside how the bytes of its keys grow."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    query = torch.randn(1, SMALL_DIM)
    seconds: list[float] = []
    async with scene.running_engine(stage, f"sqlite:///{stage.directory / 's11.sqlite3'}") as engine:
        for length in lengths:
            say(f"S11: {length:,} tokens")
            await scene.fill(engine, f"s{length}", scene.make_tokens(length, SMALL_DIM), "retrieval")
            seconds.append(await _median(lambda at=length: engine.attend(named(f"s{at}"), scene.asks(query)), 200))  # type: ignore[misc]
    pairs = itertools.pairwise(zip(lengths, seconds, strict=True))
    growth = max((later / earlier) / (larger / smaller) for (smaller, earlier), (larger, later) in pairs)
    measured = {f"ms_at_{length}": second * 1e3 for length, second in zip(lengths, seconds, strict=True)}
    return Figure("S11", "growth of latency over growth of key bytes, worst step", growth, 1.0, True, measured=measured)


async def _num_commits(engine: Engine) -> int:
    return int((await engine.info()).totals["commits"])


async def _write(engine: Engine, embeddings: Any, seconds: float) -> float:
    """Appends per second of all writers together."""
    until = time.perf_counter() + seconds
    counts = [0] * NUM_WRITERS

    async def writer(number: int) -> None:
        while time.perf_counter() < until:
            await engine.append(named(f"w{number}"), AppendRequest(embeddings=embeddings))
            counts[number] += 1

    began = time.perf_counter()
    await asyncio.gather(*(writer(number) for number in range(NUM_WRITERS)))
    return sum(counts) / (time.perf_counter() - began)


async def _median(call: Callable[[], Awaitable[Any]], repeats: int) -> float:
    """Seconds of the middle one of some calls, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[2:])[repeats // 2]


def _read_blocks(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return sum(len(data) for (data,) in connection.execute("SELECT data FROM blocks ORDER BY log, start"))
