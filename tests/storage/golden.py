"""Writes a database of today's schema version, to be kept: `python -m tests.storage.golden v0002`. Not run by tests."""

import sys
from pathlib import Path

from storage.base import (
    Append,
    Compact,
    CreateKey,
    CreateSession,
    Fork,
    KeepSketches,
    KeyRow,
    ModelRow,
    PutModel,
    Quota,
    SessionRow,
    SetQuota,
    Summary,
)
from storage.resolve import open_store


def write(path: Path) -> None:
    """One session with two blocks, a payload, an idempotency key, a summary and sketches; an empty one of its name in
    another namespace, which has a caller's key and a quota; a model of two parts; and a fork, in a third namespace.
    """
    store = open_store(f"sqlite:///{path}")
    settings = {"dim": 2, "dtype": "float16", "labels": {"kept": "yes"}}
    store.write([CreateSession(SessionRow("golden", settings, 1.0, max_tokens=100))], now=1.0)
    first = Append(1, 2, b"\x00\x3c\x00\x40\x00\x42\x00\x44", [None, '{"text": "ü"}'.encode()], episode=7)
    second = Append(1, 1, b"\x00\x45\x00\x46", idempotency_key="k", digest=b"d")
    store.write([first, second, Compact(1, Summary(0, 1, b"summary"), chunk_size=2)], now=2.0)
    store.write([KeepSketches(1, Summary(0, 1, b"sketches"), chunk_size=2, version=5)], now=2.0)
    store.write([CreateSession(SessionRow("golden", {"dim": 3}, 1.5, namespace="ana"))], now=1.5)
    store.write([CreateKey(KeyRow("ana", "laptop", bytes(range(32)), "write", 1.0, 9.0, 2.5))], now=1.0)
    store.write([SetQuota(Quota("ana", 5, None, 1_000))], now=1.0)
    store.add_model_part(7, 0, b"wei")
    store.add_model_part(7, 1, b"ghts")
    store.write([PutModel(ModelRow("default", "planner", "abc", {"dim": 2}, 7, 1.0, 7), {})], now=1.0)
    store.write([Fork(1, SessionRow("golden", settings, 3.0, namespace="bea"), chunk_size=2, length=2)], now=3.0)
    store.close()
    path.with_name(path.name + ".lock").unlink()


if __name__ == "__main__":
    target = Path(__file__).parent / "data" / f"{sys.argv[1]}.sqlite3"
    target.unlink(missing_ok=True)
    write(target)
