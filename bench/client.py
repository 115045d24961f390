"""C1 and C2: what the client takes of a processor for a call, and what it leaves of what raw sockets reach."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from htm_client import HTMClient

from bench import over_http, scene
from bench.calls import KINDS
from bench.figures import Figure, say
from bench.scene import CHUNK_SIZE, DIM, Scene

TASKS = 64
LENGTH = 1_000
"""Tokens of each session at first: few, so that the server is fast and the client shows."""
ROUNDS = 3


def measure(stage: Scene, quick: bool, wanted: Sequence[str]) -> list[Figure]:
    """Those of C1 and C2 that are wanted."""
    seconds = 0.5 if quick else 4.0
    queries = torch.randn(TASKS, DIM, generator=torch.Generator().manual_seed(2))
    figures: list[Figure] = []
    with over_http.serving(stage, data="client") as port:
        fill(stage, port, queries)
        if "C1" in wanted:
            say("C1")
            figures.append(cost(port, seconds))
        if "C2" in wanted:
            say("C2")
            figures.append(rate(stage, port, queries, seconds))
    return figures


def fill(stage: Scene, port: int, queries: torch.Tensor) -> None:
    """A session for each task, whose answer is looked at."""
    tokens = scene.make_tokens(LENGTH)
    with HTMClient(f"http://127.0.0.1:{port}") as client:
        for number in range(TASKS):
            client.create_session(f"s{number}", dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL)
            client.append(f"s{number}", tokens)
        answer = client.attend("s0", queries[:4]).output
        assert answer is not None
        scene.check(answer, stage.forward(queries[:4], tokens))


def cost(port: int, seconds: float) -> Figure:
    """Processor milliseconds of each hot call of both clients, the middle one of some rounds in turns."""
    cases = [(name, tasks, kind) for name, tasks in (("sync", 0), ("async", TASKS)) for kind in KINDS]
    rounds = [[run(port, kind, tasks, seconds)["cpu_ms"] for _, tasks, kind in cases] for _ in range(ROUNDS)]
    costs = {
        f"{name}_{kind}_ms": median(values)
        for (name, _, kind), values in zip(cases, zip(*rounds, strict=True), strict=True)
    }
    what = "processor time of a hot call, the dearest of both clients'"
    return Figure("C1", what, max(costs.values()), 0.35, True, "ms", costs)


def rate(stage: Scene, port: int, queries: torch.Tensor, seconds: float) -> Figure:
    """Steps of one async client with many tasks, beside those of as many raw sockets, in turns."""
    steps = over_http.steps(TASKS, queries)
    length = total_length(port)
    ours: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        raw.append(over_http.load(stage, port, steps, seconds, TASKS))
        ours.append(run(port, "step", TASKS, seconds))
    stepped = sum(one["all_requests"] for one in raw) + sum(one["all_calls"] for one in ours)
    assert total_length(port) == length + stepped, "each step appends one token"
    measured = {
        f"{name}_per_s": median(one["per_s"] for one in runs) for name, runs in (("client", ours), ("raw", raw))
    }
    measured["client_cpu_ms"] = median(one["cpu_ms"] for one in ours)
    measured["raw_mean_batch"] = median(one["mean_batch"] for one in raw)
    what = f"steps of one async client, {TASKS} tasks, beside raw sockets"
    return Figure("C2", what, measured["client_per_s"] / measured["raw_per_s"], 0.6, measured=measured)


def run(port: int, kind: str, tasks: int, seconds: float) -> dict[str, Any]:
    """One run of `bench.calls`."""
    command = [sys.executable, "-m", "bench.calls", "--url", f"http://127.0.0.1:{port}", "--kind", kind]
    command += ["--dim", str(DIM), "--tasks", str(tasks), "--seconds", str(seconds)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return answer


def total_length(port: int) -> int:
    """Tokens of all sessions together."""
    with HTMClient(f"http://127.0.0.1:{port}") as client:
        return sum(info.length for info in client.sessions())
