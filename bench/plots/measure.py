"""The figures of the plots, as plain values. Does not know how they are drawn."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from htm_client import HTMClient

from bench import machine, over_http, scene
from bench.figures import say
from bench.processes import Call
from bench.scene import CHUNK_SIZE, DIM, LENGTH, Scene, named

LENGTHS = (1_024, 3_200, 10_240, 32_000, 102_400, 320_000)
"""Whole chunks: for others htm-pytorch's answer is padded and masked, which takes it several times as long."""
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
NUM_SESSIONS = 16


def latency(stage: Scene, quick: bool) -> dict[str, Any]:
    """Milliseconds of the middle one of some attends of one query, by the length n of the session."""
    lengths = LENGTHS[:3] if quick else LENGTHS
    query = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    say(f"latency at n {lengths[0]:,} to {lengths[-1]:,}")
    ours = scene.run(_in_process(stage, lengths, query))
    oracle = []
    for length in lengths:
        tokens = scene.make_tokens(length)
        oracle.append(machine.median_of(11, partial(stage.forward, query, tokens)) * 1e3)
    served = []
    with over_http.serving(stage) as port:
        with HTMClient(f"http://127.0.0.1:{port}", timeout=120) as client:
            for length in lengths:
                client.create_session(f"n{length}", dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL)
                for part in scene.make_tokens(length).split(scene.PIECE):
                    client.append(f"n{length}", part)
        for length in lengths:
            call = over_http.attends(1, query)[0][0]
            there: Call = (f"/v1/sessions/n{length}/attend", *call[1:])
            served.append(over_http.load(stage, port, [there], 0.5 if quick else 2.0, 1)["p50_ms"])
    return {"n": list(lengths), "in_process_ms": ours, "served_ms": served, "htm_pytorch_ms": oracle}


async def _in_process(stage: Scene, lengths: Sequence[int], query: torch.Tensor) -> list[float]:
    medians = []
    async with scene.running_engine(stage, "memory://") as engine:
        for length in lengths:
            tokens = scene.make_tokens(length)
            await scene.fill(engine, f"n{length}", tokens)
            answer = await engine.attend(named(f"n{length}"), scene.asks(query))
            scene.check(answer.output, stage.forward(query, tokens))
        await asyncio.sleep(1)  # the threads of htm-pytorch's answer go on waiting for work for a while
        for length in lengths:
            seconds = []
            for _ in range(300):
                began = time.perf_counter()
                await engine.attend(named(f"n{length}"), scene.asks(query))
                seconds.append(time.perf_counter() - began)
            medians.append(float(np.median(seconds[100:])) * 1e3)
    return medians


def throughput(stage: Scene, quick: bool) -> dict[str, Any]:
    """What the load says of each number of connections: htm-service, its echo, the naive service."""
    connections = CONNECTIONS[::3] if quick else CONNECTIONS
    seconds = 0.5 if quick else 2.0
    tokens = scene.make_tokens(LENGTH)
    queries = torch.randn(over_http.NUM_QUERIES, DIM, generator=torch.Generator().manual_seed(2))
    found: dict[str, list[dict[str, float]]] = {"htm-service": [], "echo": [], "naive": []}

    def measure(name: str, port: int, calls: list[Call]) -> None:
        for number in connections:
            say(f"{name}, {number} connections")
            found[name].append(over_http.load(stage, port, calls, seconds, number))

    with over_http.serving(stage) as port:
        over_http.fill(port, NUM_SESSIONS, tokens, stage, queries)
        binary, _ = over_http.attends(NUM_SESSIONS, queries)
        measure("htm-service", port, binary)
        measure("echo", port, [("/echo", "application/octet-stream", binary[0][2])])
    with over_http.naive(stage) as port:
        body = json.dumps({"queries": [queries[0].tolist()]}).encode()
        measure("naive", port, [("/attend", "application/json", body)])
    return {"connections": list(connections), "sessions": NUM_SESSIONS, "runs": found}


def write(path: Path, figures: dict[str, Any]) -> None:
    """As JSON that a person can read, and a diff can show."""
    path.write_text(json.dumps(figures, indent=1) + "\n")
