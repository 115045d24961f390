"""htm-service as its users have it: `htm-service serve`, SQLite, the built-in model, payloads, one session."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import processes
from bench.figures import say
from bench.load import MARK
from bench.peers.figures import CLIENTS, ROUNDS, Row, better, measure_appends
from bench.peers.memories import NUM_RECALLED, Memories
from bench.processes import Call
from examples.demo.server_process import ServerProcess
from htm_service.version import __version__

NUM_CHUNKS = (8, 16, 32, 64)
"""How many chunks of 32 tokens are searched in full."""
PIECE = 5_000


def measure(memories: Memories, directory: Path, seconds: float) -> list[Row]:
    """A row for each number of chunks; the first has the appends."""
    with _serving(directory) as (client, port):
        began = time.perf_counter()
        _fill(client, "ordered", memories)
        client.recall("ordered", memories.queries[0], NUM_RECALLED)
        fill_s = time.perf_counter() - began
        _fill(client, "shuffled", shuffled := memories.shuffled())
        texts = [token.payload for token in client.recall("ordered", memories.queries[0], 1)]
        assert texts == [{"text": memories.texts[_found(client, "ordered", memories, 8)[0][0]]}]
        recalls = {}
        for top_k in NUM_CHUNKS:
            recalls[top_k] = memories.recall_of(_found(client, "ordered", memories, top_k))
            recalls[-top_k] = shuffled.recall_of(_found(client, "shuffled", shuffled, top_k))
            say(f"htm-service, k {top_k}: recall {recalls[top_k]:.3f}, of the shuffled tokens {recalls[-top_k]:.3f}")
        say("htm-service: searches, appends")
        runs: dict[tuple[int, int], list[Mapping[str, float]]] = defaultdict(list)
        for _ in range(ROUNDS):  # in turns, so that none is always the first
            for top_k in NUM_CHUNKS:
                for clients in CLIENTS:
                    found = processes.load(directory, port, _searches(memories, top_k), seconds, clients)
                    runs[top_k, clients].append(found)
        searches = {k: {clients: better(runs[k, clients]) for clients in CLIENTS} for k in NUM_CHUNKS}

        def append(clients: int) -> Mapping[str, float]:
            return processes.load(directory, port, _appends(memories), seconds, clients)

        appends, flushes = measure_appends(append)
    first, *others = NUM_CHUNKS
    system = f"htm-service {__version__}"
    return [
        Row(f"{system}, k {first}", recalls[first], searches[first], appends, fill_s, flushes),
        *(Row(f"{system}, k {top_k}", recalls[top_k], searches[top_k]) for top_k in others),
        *(Row(f"{system}, k {top_k}, shuffled", recalls[-top_k], {}) for top_k in NUM_CHUNKS),
    ]


@contextmanager
def _serving(directory: Path) -> Iterator[tuple[HTMClient, int]]:
    server = ServerProcess(directory / "data", directory / "log")
    server.start()
    try:
        with HTMClient(server.url, timeout=120) as client:
            yield client, server.port
    finally:
        server.stop()


def _fill(client: HTMClient, session: str, memories: Memories) -> None:
    client.create_session(session, dim=memories.vectors.shape[1])
    for start in range(0, len(memories.texts), PIECE):
        part = slice(start, start + PIECE)
        client.append(session, memories.vectors[part], [{"text": text} for text in memories.texts[part]])


def _found(client: HTMClient, session: str, memories: Memories, top_k: int) -> list[list[int]]:
    found = client.recall_many(session, memories.queries, NUM_RECALLED, top_k=top_k)
    return [[token.position for token in tokens] for tokens in found]


def _searches(memories: Memories, top_k: int) -> list[Call]:
    """What the client's `recall` sends."""
    calls: list[Call] = []
    for query in memories.queries:
        options = {"top_k": top_k, "max_recalled": NUM_RECALLED, "rank_by": "score"}
        call = Codec(binary=True).attend("ordered", *attend_parts(query, returns=("payloads",), **options))
        calls.append((call.path, call.headers["Content-Type"], call.content or b""))
    return calls


def _appends(memories: Memories) -> list[Call]:
    """What the client's `append` sends, which makes it safe to send again; all to the session that is searched."""
    calls: list[Call] = []
    for query, text in zip(memories.queries, memories.texts, strict=False):
        call = Codec(binary=True).append(
            "ordered", query[np.newaxis], [{"text": text}], conditions={"idempotency_key": MARK}
        )
        headers = {name: value for name, value in call.headers.items() if name not in ("Content-Type", "Accept")}
        assert json.dumps(headers).count(MARK) == 1
        calls.append((call.path, call.headers["Content-Type"], call.content or b"", headers))
    return calls
