"""Chroma's server, as `chroma run` starts it: inner product, and everything else at its defaults.

It is sent what its own Python client sends, but by the load generator of all HTTP systems.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import processes
from bench.figures import say
from bench.load import MARK
from bench.peers.figures import Row, measure_appends, measure_searches
from bench.peers.memories import NUM_RECALLED, Floats, Memories
from bench.processes import Call

COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"
PIECE = 5_000
"""The server takes at most 5,461 at once."""


def why_not(environment: Path) -> str:
    """Why there is nothing to measure, or ""."""
    return "" if (environment / "bin" / "chroma").exists() else f"chromadb is not in {environment}"


def measure(environment: Path, memories: Memories, directory: Path, seconds: float) -> list[Row]:
    """Its one row."""
    port = processes.free_port()
    command = [str(environment / "bin" / "chroma"), "run", "--path", str(directory / "chroma")]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with processes.process(command, {"ANONYMIZED_TELEMETRY": "False"}):
        processes.wait_for(f"http://127.0.0.1:{port}/api/v2/heartbeat")
        began = time.perf_counter()
        made = _post(port, COLLECTIONS, {"name": "memories", "configuration": {"hnsw": {"space": "ip"}}})
        path = f"{COLLECTIONS}/{made['id']}"
        for start in range(0, len(memories.texts), PIECE):
            part = slice(start, start + PIECE)
            ids = [str(place) for place in range(len(memories.texts))[part]]
            _post(port, f"{path}/add", _batch(ids, memories.vectors[part], memories.texts[part]))
        answers = [_post(port, f"{path}/query", _query(memories.queries[0]))]
        fill_s = time.perf_counter() - began
        answers += [_post(port, f"{path}/query", _query(query)) for query in memories.queries[1:]]
        found = [[int(id) for id in answer["ids"][0]] for answer in answers]
        assert answers[0]["documents"][0] == [memories.texts[place] for place in found[0]]
        say(f"Chroma: recall {memories.recall_of(found):.3f}")

        def load(calls: list[Call], clients: int) -> Mapping[str, float]:
            return processes.load(directory, port, calls, seconds, clients)

        searches = measure_searches(partial(load, _searches(path, memories)))
        appends, flushes = measure_appends(partial(load, _appends(path, memories)))
    return [Row(f"Chroma {_version(environment)}", memories.recall_of(found), searches, appends, fill_s, flushes)]


def _version(environment: Path) -> str:
    (found,) = environment.glob("lib/python*/site-packages/chromadb-*.dist-info")
    return found.name.removeprefix("chromadb-").removesuffix(".dist-info")


def _batch(ids: list[str], vectors: Floats, texts: list[str]) -> dict[str, Any]:
    encoded = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
    return {"ids": ids, "embeddings": encoded, "documents": texts, "metadatas": None, "uris": None}


def _query(query: Floats) -> dict[str, Any]:
    included = ["documents", "distances"]
    return {"query_embeddings": [query.tolist()], "n_results": NUM_RECALLED, "include": included}


def _searches(path: str, memories: Memories) -> list[Call]:
    return [(f"{path}/query", "application/json", json.dumps(_query(query)).encode()) for query in memories.queries]


def _appends(path: str, memories: Memories) -> list[Call]:
    """Each with an id of its own: one that is there already would be passed over."""
    bodies = [
        _batch([MARK], query[None], [text]) for query, text in zip(memories.queries, memories.texts, strict=False)
    ]
    return [(f"{path}/add", "application/json", json.dumps(body).encode()) for body in bodies]


def _post(port: int, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)
