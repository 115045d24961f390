"""htm-service as its users have it: `htm-service serve`, SQLite, the built-in model, payloads, one session."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import processes
from bench.figures import say
from bench.load import MARK
from bench.peers.figures import CLIENTS, ROUNDS, SYSTEM, Row, better, measure_appends
from bench.peers.memories import NUM_RECALLED, Memories
from bench.processes import Call
from examples.demo.server_process import ServerProcess
from htm_service.version import __version__

NUM_CHUNKS = (8, 16, 32, 64)
"""How many chunks of 32 tokens a recall looks into; the first is measured for its rates too."""
SEARCHES: Mapping[str, Mapping[str, Any]] = {"search": {}, "search, exact": {"exact": True}}
PIECE = 5_000


def measure(memories: Memories, directory: Path, seconds: float) -> list[Row]:
    """A row for each kind of search, the first with the appends, and for recalls of each number of chunks."""
    with _serving(directory) as (client, port):
        began = time.perf_counter()
        fill(client, "ordered", memories)
        client.search("ordered", memories.queries[0], NUM_RECALLED)
        fill_s = time.perf_counter() - began
        fill(client, "shuffled", shuffled := memories.shuffled())
        texts = [token.payload for token in client.search("ordered", memories.queries[0], 1)]
        assert texts == [{"text": memories.texts[found(client, "ordered", memories)[0][0]]}]
        shares = {}
        for name, options in SEARCHES.items():
            shares[name] = memories.recall_of(found(client, "ordered", memories, **options))
            shares[f"{name}, shuffled"] = shuffled.recall_of(found(client, "shuffled", shuffled, **options))
        for top_k in NUM_CHUNKS:
            shares[f"recall, k {top_k}"] = memories.recall_of(_recalled(client, "ordered", memories, top_k))
            shares[f"recall, k {top_k}, shuffled"] = shuffled.recall_of(_recalled(client, "shuffled", shuffled, top_k))
        for name, share in shares.items():
            say(f"htm-service, {name}: {share:.3f} of the best")
        say("htm-service: searches, appends")
        asked = {name: _searches(memories, options) for name, options in SEARCHES.items()}
        asked[f"recall, k {NUM_CHUNKS[0]}"] = _recalls(memories, NUM_CHUNKS[0])
        runs: dict[tuple[str, int], list[Mapping[str, float]]] = defaultdict(list)
        for _ in range(ROUNDS):  # in turns, so that none is always the first
            for name, calls in asked.items():
                for clients in CLIENTS:
                    runs[name, clients].append(processes.load(directory, port, calls, seconds, clients))
        rates = {name: {clients: better(runs[name, clients]) for clients in CLIENTS} for name in asked}

        def append(clients: int) -> Mapping[str, float]:
            return processes.load(directory, port, _appends(memories), seconds, clients)

        appends, flushes = measure_appends(append)
    first, *others = shares
    system = f"{SYSTEM} {__version__}"
    return [
        Row(f"{system}, {first}", shares[first], rates[first], appends, fill_s, flushes),
        *(Row(f"{system}, {name}", shares[name], rates.get(name, {})) for name in others),
    ]


@contextmanager
def _serving(directory: Path) -> Iterator[tuple[HTMClient, int]]:
    server = ServerProcess(directory / "data", directory / "log")
    server.start()
    try:
        with HTMClient(server.url, timeout=120) as client:
            while "on its way" in client.info()["kernel_reason"]:  # the reference serves until it is compiled
                time.sleep(0.5)
            yield client, server.port
    finally:
        server.stop()


def fill(client: HTMClient, session: str, memories: Memories) -> None:
    """Make a session of all of them, with their texts."""
    client.create_session(session, dim=memories.vectors.shape[1])
    for start in range(0, len(memories.texts), PIECE):
        part = slice(start, start + PIECE)
        client.append(session, memories.vectors[part], [{"text": text} for text in memories.texts[part]])


def found(client: HTMClient, session: str, memories: Memories, **options: Any) -> list[list[int]]:
    """The positions that a search finds, for each query."""
    rows = client.search_many(session, memories.queries, NUM_RECALLED, **options)
    return [[token.position for token in row] for row in rows]


def _recalled(client: HTMClient, session: str, memories: Memories, top_k: int) -> list[list[int]]:
    rows = client.recall_many(session, memories.queries, NUM_RECALLED, top_k=top_k)
    return [[token.position for token in row] for row in rows]


def _searches(memories: Memories, options: Mapping[str, Any]) -> list[Call]:
    """What the client's `search` sends."""
    codec = Codec(binary=True)
    parts = [attend_parts(query, returns=("payloads",), n=NUM_RECALLED, **options) for query in memories.queries]
    return [_call(codec.search("ordered", *part)) for part in parts]


def _recalls(memories: Memories, top_k: int) -> list[Call]:
    """What the client's `recall` sends."""
    codec = Codec(binary=True)
    options: Mapping[str, Any] = {"top_k": top_k, "max_recalled": NUM_RECALLED, "rank_by": "score"}
    parts = [attend_parts(query, returns=("payloads",), **options) for query in memories.queries]
    return [_call(codec.attend("ordered", *part)) for part in parts]


def _call(sent: Any) -> Call:
    return sent.path, sent.headers["Content-Type"], sent.content or b""


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
