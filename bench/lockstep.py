"""S17: a step of many sessions in one request, beside single steps of as many clients as connections; same sessions."""

from __future__ import annotations

import torch
from htm_client import HTMClient
from htm_client.batches import Batch
from htm_client.calls import Codec

from bench import over_http, scene
from bench.figures import Figure, say
from bench.processes import Call
from bench.scene import CHUNK_SIZE, DIM, Scene

SESSIONS = 256
LENGTH = 2_000
"""Tokens of each session at first."""
FILLED_AT_ONCE = 16
"""Sessions whose tokens one request brings: 64 MiB."""


def measure(stage: Scene, quick: bool) -> Figure:
    """Session-steps a second of both, in turns."""
    num_sessions, seconds = (64 if quick else SESSIONS), (1.5 if quick else 4.0)
    queries = torch.randn(num_sessions, DIM, generator=torch.Generator().manual_seed(2))
    with over_http.serving(stage, data="lockstep") as port:
        say(f"S17: {num_sessions} sessions of {LENGTH:,} tokens are filled")
        fill(stage, port, queries)
        single, together = over_http.steps(num_sessions, queries), [lockstep(queries)]
        rounds = []
        for _ in range(over_http.TURNS):
            ours = over_http.load(stage, port, together, seconds, 1)
            rounds.append((ours["per_s"] * num_sessions, ours, over_http.load(stage, port, single, seconds)))
    per_s, ours, beside = sorted(rounds, key=lambda one: one[0] / one[2]["per_s"])[over_http.TURNS // 2]
    measured = {
        "sessions": num_sessions,
        "batch_steps_per_s": per_s,
        "batch_item_us": 1e6 / per_s,
        "batch_p50_ms": ours["p50_ms"],
        "batch_p99_ms": ours["p99_ms"],
        "single_steps_per_s": beside["per_s"],
        "single_p99_ms": beside["p99_ms"],
    }
    what = f"steps of {num_sessions} sessions in one request, beside single ones"
    return Figure("S17", what, per_s / beside["per_s"], 3, measured=measured)


def lockstep(queries: torch.Tensor) -> Call:
    """One step of all sessions, each with its query, which it appends then."""
    batch = Batch([f"s{number}" for number in range(len(queries))], "raise")
    call = batch.step(Codec(binary=True), queries, queries, {}, {})
    return (call.path, call.headers["Content-Type"], call.content or b"")


def fill(stage: Scene, port: int, queries: torch.Tensor) -> None:
    """The sessions, whose answers are looked at."""
    tokens = scene.make_tokens(LENGTH)
    names = [f"s{number}" for number in range(len(queries))]
    with HTMClient(f"http://127.0.0.1:{port}", timeout=120) as client:
        for name in names:
            client.create_session(name, dim=DIM, chunk_size=CHUNK_SIZE, model=scene.MODEL)
        for first in range(0, len(names), FILLED_AT_ONCE):
            some = names[first : first + FILLED_AT_ONCE]
            client.batch_append(some, tokens.expand(len(some), -1, -1))
        answer = client.batch_attend(names, queries)
        assert answer.output is not None
        scene.check(answer.output[:4, 0], stage.forward(queries[:4], tokens))
