"""S19: attends while a learner replaces their model five times a second, beside attends by themselves, in turns.

The server, the load and the learner are processes of their own, or a thread of this one that does little else. Appends
are looked at in the same way: the weights go to the store that they wait for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from htm_client import HTMClient

from bench import over_http, scene
from bench.figures import Figure, say
from bench.over_http import NUM_QUERIES, TURNS, appends, attends, load, serving
from bench.scene import CHUNK_SIZE, DIM, LENGTH, TOP_K, Scene

MODEL = "learned"
PUSHES_PER_S = 5
NUM_VERSIONS = 4
"""Different weights, put in turns."""


class Learner:
    """Puts other weights PUSHES_PER_S times a second while it is at work; what it raises ends the benchmark."""

    def __init__(self, stage: Scene, port: int) -> None:
        self.seconds: list[float] = []
        """That each put took."""
        state = stage.oracle.state_dict()
        self._versions = [
            {**state, "to_summary_queries.bias": state["to_summary_queries.bias"] + n} for n in range(NUM_VERSIONS)
        ]
        self._client = HTMClient(f"http://127.0.0.1:{port}", retries=0)

    def put(self, number: int = 0) -> int:
        """Put one; the bytes that it has."""
        version = self._versions[number % NUM_VERSIONS]
        model = self._client.put_model(MODEL, version, heads=scene.HEADS, top_k=TOP_K, chunk_size=CHUNK_SIZE)
        return model.bytes or 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """It pushes meanwhile."""
        is_done, errors = threading.Event(), list[BaseException]()

        def push() -> None:
            began, number = time.monotonic(), 0
            try:
                while not is_done.wait(max(0.0, began + number / PUSHES_PER_S - time.monotonic())):
                    number += 1
                    put_at = time.monotonic()
                    self.put(number)
                    self.seconds.append(time.monotonic() - put_at)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()
        if errors:
            raise errors[0]


def measure(stage: Scene, quick: bool) -> Figure:
    """S19. A load raises for the first request that is not answered 200."""
    sessions, seconds = (4, 3.0) if quick else (16, 8.0)
    tokens = scene.make_tokens(LENGTH)
    queries = torch.randn(NUM_QUERIES, DIM, generator=torch.Generator().manual_seed(2))
    calls, _ = attends(sessions, queries)
    with serving(stage, data="swaps") as port:
        learner = Learner(stage, port)
        num_bytes = learner.put()
        over_http.fill(port, sessions, tokens, stage, queries, model=MODEL)
        rounds: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {"attends": [], "appends": []}
        for name, some in (("attends", calls), ("appends", appends(queries))):
            for _ in range(TURNS):
                alone = load(stage, port, some, seconds)
                with learner.at_work():
                    rounds[name].append((alone, load(stage, port, some, seconds)))
    measured: dict[str, float] = {"put_bytes": num_bytes, "puts": len(learner.seconds)}
    measured["put_p50_ms"] = float(np.percentile(learner.seconds, 50)) * 1e3
    ratios = {}
    for name, pairs in rounds.items():
        pairs.sort(key=lambda pair: float(pair[1]["p99_ms"] / pair[0]["p99_ms"]))
        alone, pushed = pairs[TURNS // 2]
        ratios[name] = pushed["p99_ms"] / alone["p99_ms"]
        for key in ("per_s", "p50_ms", "p99_ms"):
            measured |= {f"{name}_alone_{key}": alone[key], f"{name}_pushed_{key}": pushed[key]}
    measured["appends_p99_ratio"] = ratios["appends"]
    say(f"appends beside the same: p99 {ratios['appends']:.2f} times")
    what = (
        f"p99 of attends while {num_bytes / 1e6:.1f} MB of weights come {PUSHES_PER_S} times a second, beside without"
    )
    return Figure("S19", what, ratios["attends"], 2.0, at_most=True, measured=measured)
