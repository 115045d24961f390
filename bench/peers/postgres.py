"""PostgreSQL with pgvector, on a cluster made for one run and thrown away, all settings at their defaults.

Its client is `bench.peers.postgres_client`, which runs in the peers' environment: that has pgvector's types.
"""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import cluster
from bench.figures import say
from bench.peers.figures import Row, measure_appends, measure_searches
from bench.peers.memories import NUM_RECALLED, Memories


def find(environment: Path) -> Path | None:
    """The programs of a PostgreSQL that has pgvector: in PATH, Debian's, or the one of the peers' environment."""
    places = [*cluster.of_system(), *cluster.of_wheel(environment)]
    return next((place for place in places if _has_pgvector(place)), None)


def why_not(environment: Path) -> str:
    """Why there is nothing to measure, or ""."""
    if not list(environment.glob("lib/python*/site-packages/psycopg")):
        return f"psycopg is not in {environment}"
    return "" if find(environment) else "no PostgreSQL with pgvector was found"


def measure(environment: Path, memories: Memories, directory: Path, seconds: float) -> list[Row]:
    """A row with HNSW and one without an index."""
    programs = find(environment)
    assert programs is not None
    np.savez(directory / "memories.npz", vectors=memories.vectors, queries=memories.queries)
    (directory / "texts.json").write_text(json.dumps(memories.texts))
    rows = []
    with cluster.running(programs) as port:

        def ask(*words: str) -> Any:
            """What the client says to these words."""
            python = str(environment / "bin" / "python")
            command = [python, "-m", "bench.peers.postgres_client", "--port", str(port), *words]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

        def load(what: str, table: str, clients: int) -> Any:
            options = ["--clients", str(clients), "--seconds", str(seconds), "--data", str(directory)]
            return ask(what, "--table", table, *options)

        for table, name in (("hnsw", "HNSW"), ("plain", "no index")):
            filled = ask("fill", "--table", table, "--data", str(directory))
            answered = ask("ask", "--table", table, "--data", str(directory), "--num", str(NUM_RECALLED))
            assert answered["contents"] == [memories.texts[place] for place in answered["found"][0]]
            assert (filled["fsync"], filled["synchronous_commit"]) == ("on", "on")
            recall = memories.recall_of(answered["found"])
            system = f"PostgreSQL {filled['postgres']}, pgvector {filled['pgvector']}, {name}"
            say(f"{system}: recall {recall:.3f}")
            searches = measure_searches(partial(load, "search", table))
            appends, flushes = measure_appends(partial(load, "append", table))
            rows.append(Row(system, recall, searches, appends, filled["fill_s"], flushes))
    return rows


def _has_pgvector(programs: Path) -> bool:
    root = programs.parent
    shares = [root / "share" / "postgresql", root / "share", Path("/usr/share/postgresql") / root.name]
    return any((share / "extension" / "vector.control").exists() for share in shares)
