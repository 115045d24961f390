"""A real server: what was deleted, expired or trimmed is soon in no file of its data directory, and stays so."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from htm_client import HTMClient, NotFound

from htm_service.writes.expiry import ERASE_S
from tests.served.server import Server

DIM, CHUNK = 61, 8
KINDS = ("deleted", "expired", "trimmed", "kept")


def embedding(kind: str, position: int) -> np.ndarray:
    return np.random.default_rng([KINDS.index(kind), position]).standard_normal(DIM, dtype=np.float32)


def text(kind: str, position: int) -> str:
    return f"what nobody is to find of {kind} at {position:04}"


def is_there(data: Path, kind: str, position: int) -> bool:
    """Whether a file of the data directory holds a token's payload or embedding."""
    needles = text(kind, position).encode(), embedding(kind, position).tobytes()
    return any(needle in content for file in data.iterdir() for content in [file.read_bytes()] for needle in needles)


def wait_until_gone(data: Path, kind: str, position: int) -> None:
    deadline = time.monotonic() + 3 * ERASE_S
    while is_there(data, kind, position):
        assert time.monotonic() < deadline, f"{text(kind, position)!r} is still in a file"
        time.sleep(0.2)


def test_what_is_gone_is_in_no_file(server: Server) -> None:
    """A payload was in the write-ahead log 95 s and 300 appends after its session was deleted."""
    server.start()
    with HTMClient(server.url) as client:
        for kind in KINDS:
            if kind == "trimmed":
                client.create_session(kind, dim=DIM, chunk_size=CHUNK, max_tokens=40, on_full="evict_oldest")
            else:
                client.create_session(kind, dim=DIM, chunk_size=CHUNK)
        for position in range(60):
            for kind in KINDS:
                payloads = [{"text": text(kind, position)}]
                client.append(kind, [embedding(kind, position)], payloads=payloads, idempotency_key=str(position))
        assert all(is_there(server.data, kind, 33) for kind in KINDS)
        client.delete_session("deleted")
        client.update_session("expired", ttl_s=0.1)
        time.sleep(0.2)
        with pytest.raises(NotFound, match="idle"):
            client.session("expired")
        for kind in ("deleted", "expired", "trimmed"):
            wait_until_gone(server.data, kind, 7)
        first = client.session("trimmed").first_position
        wait_until_gone(server.data, "trimmed", first - 1)
        server.restart(signal.SIGKILL)
    assert not any(is_there(server.data, kind, position) for kind in ("deleted", "expired") for position in range(60))
    assert not any(is_there(server.data, "trimmed", position) for position in range(first))
    assert is_there(server.data, "kept", 7) and is_there(server.data, "trimmed", first)
