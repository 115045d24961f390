"""Fills, asks and loads PostgreSQL through psycopg; run in the peers' environment, where nothing of ours is installed.

Load comes from as many threads and connections as there are clients; vectors travel in binary, statements are
prepared, and every insert is a transaction. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from pgvector.psycopg import register_vector


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fill", "ask", "search", "append"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--table", choices=["hnsw", "plain"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num", type=int, default=8)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    tensors = np.load(options.data / "memories.npz")
    texts = json.loads((options.data / "texts.json").read_text())
    if options.what == "fill":
        answer = fill(options.port, options.table, tensors["vectors"], texts, tensors["queries"][0])
    elif options.what == "ask":
        answer = ask(options.port, options.table, tensors["queries"], options.num)
    else:
        statement = search(options.table, options.num) if options.what == "search" else insert(options.table)
        named = [{"vector": query, "text": text} for query, text in zip(tensors["queries"], texts, strict=False)]
        once = run(options.port, statement, named, options.clients, 1.0)
        answer = run(options.port, statement, named, options.clients, options.seconds)
        answer["all_requests"] = once["requests"] + answer["requests"]
    print(json.dumps(answer))


def search(table: str, num: int) -> str:
    """The best by inner product, with their contents."""
    distance = "embedding <#> %(vector)b"
    return f"SELECT id, content, {distance} FROM {table} ORDER BY {distance} LIMIT {num}"


def insert(table: str) -> str:
    """One vector with its content."""
    return f"INSERT INTO {table} (content, embedding) VALUES (%(text)s, %(vector)b)"


def connect(port: int) -> Any:
    """A connection that commits every statement."""
    connection = psycopg.connect(f"host=127.0.0.1 port={port} user=bench dbname=postgres", autocommit=True)
    register_vector(connection)
    return connection


def fill(port: int, table: str, vectors: Any, texts: list[str], query: Any) -> dict[str, Any]:
    """Make the table and, unless it is the plain one, its index with the defaults; until the first answer."""
    with psycopg.connect(f"host=127.0.0.1 port={port} user=bench dbname=postgres", autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    with connect(port) as connection:
        began = time.perf_counter()
        connection.execute(
            f"CREATE TABLE {table} (id bigserial PRIMARY KEY, content text, embedding vector({vectors.shape[1]}))"
        )
        with connection.cursor().copy(f"COPY {table} (content, embedding) FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["text", "vector"])
            for text, vector in zip(texts, vectors, strict=True):
                copy.write_row((text, vector))
        if table == "hnsw":
            connection.execute(f"CREATE INDEX ON {table} USING hnsw (embedding vector_ip_ops)")
        connection.execute(search(table, 8), {"vector": query}).fetchall()
        seconds = time.perf_counter() - began
        connection.execute(f"ANALYZE {table}")  # what autovacuum would do a minute later
        shown = {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in ("fsync", "synchronous_commit")}
        version = connection.execute("SHOW server_version").fetchone()[0].split()[0]
        extension = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()[0]
    return {"fill_s": seconds, "postgres": version, "pgvector": extension, **shown}


def ask(port: int, table: str, queries: Any, num: int) -> dict[str, Any]:
    """Places, counted from 0, that each query finds; the contents of the first's."""
    with connect(port) as connection:
        answers = [connection.execute(search(table, num), {"vector": query}).fetchall() for query in queries]
    found = [[id - 1 for id, _, _ in answer] for answer in answers]
    return {"found": found, "contents": [content for _, content, _ in answers[0]]}


def run(port: int, statement: str, named: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, float]:
    """What `bench.load` would say: rates, latencies, and the share of a core that this process took."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    start = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        with connect(port) as connection:
            start.wait()
            until = time.perf_counter() + seconds
            for values in itertools.islice(itertools.cycle(named), number, None):
                began = time.perf_counter()
                if began >= until:
                    return
                cursor = connection.execute(statement, values)
                if cursor.description:
                    cursor.fetchall()
                latencies[number].append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began, cpu = time.perf_counter(), _cpu_seconds()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    all_of_them = np.concatenate([np.array(some) for some in latencies])
    return {
        "requests": len(all_of_them),
        "per_s": len(all_of_them) / wall,
        "p50_ms": float(np.percentile(all_of_them, 50)) * 1e3,
        "p99_ms": float(np.percentile(all_of_them, 99)) * 1e3,
        "load_cpu_share": (_cpu_seconds() - cpu) / wall,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
