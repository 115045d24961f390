"""S1 to S3, S8 and S9: the server over HTTP, beside the naive service and beside an echo of the same app.

Each server is a process of its own, and the load comes from a third.
"""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import processes, scene
from bench.figures import Figure, say
from bench.processes import Call
from bench.scene import CHUNK_SIZE, DIM, DIM_HEAD, HEADS, LENGTH, TOP_K, Scene

CONNECTIONS = 32
ADMIN_KEY = "the-admins-key-of-the-benchmark"
TURNS = 5
"""Of what is measured in turns: the median counts."""
NUM_QUERIES = 64
"""Different queries, taken in turn."""


def measure(stage: Scene, quick: bool, sessions: int, wanted: Sequence[str]) -> list[Figure]:
    """Those of S1, S2, S3, S8, S9 that are wanted."""
    seconds = 2.0 if quick else 6.0
    tokens = scene.make_tokens(LENGTH)
    queries = torch.randn(NUM_QUERIES, DIM, generator=torch.Generator().manual_seed(2))
    with serving(stage) as port:
        say(f"{sessions} sessions of {LENGTH:,} tokens are filled")
        fill(port, sessions, tokens, stage, queries)
        binary, as_json = attends(sessions, queries)
        rates = {"binary": load(stage, port, binary, seconds), "json": load(stage, port, as_json, seconds)}
        rates["echo"] = load(stage, port, [("/echo", "application/octet-stream", binary[0][2])], seconds)
        if {"S8", "S9"}.intersection(wanted):
            echo: list[Call] = [("/echo", "application/octet-stream", binary[0][2])]
            rates["append"], rates["echo_between"] = in_turns(stage, port, appends(queries), echo, seconds / 2)
            rates["step"], rates["binary_between"] = in_turns(
                stage, port, steps(sessions, queries), binary, seconds / 2
            )
    with naive(stage) as port:
        calls: list[Call] = [("/attend", "application/json", json.dumps({"queries": [queries[0].tolist()]}).encode())]
        scene.check(_naive_answer(port, calls[0]), stage.oracle(queries[None, :1], tokens[None])[0].detach())
        rates["naive"] = load(stage, port, calls, seconds)

    def ratio(upper: str, lower: str) -> float:
        return float(rates[upper]["per_s"] / rates[lower]["per_s"])

    def figure(id: str, what: str, upper: str, lower: str, bar: float) -> Figure:
        keys = ("per_s", "p50_ms", "p99_ms", "load_cpu_share")
        measured = {f"{name}_{key}": rates[name][key] for name in (upper, lower) for key in keys}
        measured["mean_batch"] = rates[upper]["mean_batch"]
        return Figure(id, what, ratio(upper, lower), bar, measured=measured)

    figures = [
        figure("S1", "served attends, binary, beside the naive service", "binary", "naive", 60),
        figure("S2", "served attends, binary, beside the echo", "binary", "echo", 0.5),
        figure("S3", "served attends, JSON, beside the naive service", "json", "naive", 25),
    ]
    if "append" in rates:
        figures.append(figure("S8", "durable appends over HTTP, beside the echo", "append", "echo_between", 0.4))
        figures.append(figure("S9", "steps over HTTP, beside attends", "step", "binary_between", 0.6))
    return [figure for figure in figures if figure.id in wanted]


def load(
    stage: Scene,
    port: int,
    calls: Sequence[Call],
    seconds: float,
    connections: int = CONNECTIONS,
    warm_s: float = 1.0,
) -> dict[str, Any]:
    """One run of the load generator, after a short one to warm up."""
    return processes.load(stage.directory, port, calls, seconds, connections, warm_s)


def in_turns(
    stage: Scene, port: int, calls: Sequence[Call], beside: Sequence[Call], seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both loads in turns, and of these rounds the one whose ratio is the median.

    What waits for the disk, beside what does not, is moved most by whatever else the machine does: measured once each
    and one after the other, S8 was not the same twice.
    """
    rounds = [(load(stage, port, calls, seconds), load(stage, port, beside, seconds)) for _ in range(TURNS)]
    return sorted(rounds, key=lambda pair: float(pair[0]["per_s"] / pair[1]["per_s"]))[TURNS // 2]


@contextlib.contextmanager
def serving(stage: Scene, *options: str, data: str = "data", env: Mapping[str, str] | None = None) -> Iterator[int]:
    """htm-service, with an echo, on SQLite in a folder `data`; `options` are those of `bench.server`."""
    port = processes.free_port()
    command = [sys.executable, "-m", "bench.server", "--port", str(port), "--data", str(stage.directory / data)]
    command += ["--models-dir", str(stage.models), *options]
    with processes.process(command, env):
        processes.wait_for(f"http://127.0.0.1:{port}/readyz")
        yield port


@contextlib.contextmanager
def naive(stage: Scene) -> Iterator[int]:
    """The naive service."""
    port = processes.free_port()
    command = [sys.executable, "-m", "bench.naive", "--port", str(port), "--length", str(LENGTH)]
    for name, value in (("dim", DIM), ("heads", HEADS), ("dim-head", DIM_HEAD), ("top-k", TOP_K)):
        command += [f"--{name}", str(value)]
    command += ["--chunk-size", str(CHUNK_SIZE), "--weights", str(stage.weights)]
    with processes.process(command):
        processes.wait_for(f"http://127.0.0.1:{port}/docs")
        yield port


def fill(
    port: int,
    sessions: int,
    tokens: torch.Tensor,
    stage: Scene,
    queries: torch.Tensor,
    api_key: str | None = None,
    model: str = scene.MODEL,
) -> None:
    """Sessions full of tokens for attends, empty ones for writers; an answer of the first is compared."""
    with HTMClient(f"http://127.0.0.1:{port}", timeout=120, api_key=api_key) as client:
        for number in range(sessions):
            client.create_session(f"s{number}", dim=DIM, chunk_size=CHUNK_SIZE, model=model)
            for part in tokens.split(scene.PIECE):
                client.append(f"s{number}", part)
        for number in range(CONNECTIONS):  # writers and steppers have sessions of their own
            client.create_session(f"w{number}", dim=DIM, chunk_size=CHUNK_SIZE, model=model)
        answer = client.attend("s0", queries[:4]).output
        assert answer is not None
        scene.check(answer, stage.forward(queries[:4], tokens))


def attends(sessions: int, queries: torch.Tensor) -> tuple[list[Call], list[Call]]:
    """The same attends in both formats."""
    binary: list[Call] = []
    as_json: list[Call] = []
    for number, query in enumerate(queries):
        path = f"/v1/sessions/s{number % sessions}/attend"
        call = Codec(binary=True).attend("s", *attend_parts(query))
        binary.append((path, call.headers["Content-Type"], call.content or b""))
        as_json.append((path, "application/json", json.dumps({"queries": [query.tolist()]}).encode()))
    return binary, as_json


def appends(queries: torch.Tensor) -> list[Call]:
    """One token each, every connection to a session of its own."""
    calls: list[Call] = []
    for number in range(CONNECTIONS):
        call = Codec(binary=True).append("s", queries[number], None, conditions={})
        calls.append((f"/v1/sessions/w{number}/memories", call.headers["Content-Type"], call.content or b""))
    return calls


def steps(sessions: int, queries: torch.Tensor) -> list[Call]:
    """The attends of S1, each with a token to append."""
    calls: list[Call] = []
    for number, query in enumerate(queries):
        call = Codec(binary=True).step("s", attend_parts(query), query, {})
        kind = call.headers["Content-Type"]
        calls.append((f"/v1/sessions/s{number % sessions}/step", kind, call.content or b""))
    return calls


def _naive_answer(port: int, call: Call) -> np.ndarray[Any, np.dtype[np.float32]]:
    path, kind, body, *_ = call
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as response:
        return np.array(json.load(response)["output"], np.float32)
