"""A real server: what was deleted, expired or trimmed is soon in no file of its data directory, and stays so."""

from __future__ import annotations

import signal
import time
from pathlib import Path

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


def present(data: Path, kind: str, positions: range) -> list[int]:
    """The tokens of which a file of the data directory holds the payload or the embedding."""
    contents = [file.read_bytes() for file in data.iterdir()]
    needles = {position: (text(kind, position).encode(), embedding(kind, position).tobytes()) for position in positions}
    return [position for position, both in needles.items() for content in contents if any(map(content.count, both))]


def wait_until_gone(data: Path, kind: str, positions: range) -> None:
    deadline = time.monotonic() + 12 * ERASE_S  # it takes one, on a machine that is busy more
    while left := present(data, kind, positions):
        assert time.monotonic() < deadline, f"of {kind} these are still in a file: {left}"
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
        assert all(present(server.data, kind, range(33, 34)) for kind in KINDS)
        client.delete_session("deleted")
        client.update_session("expired", ttl_s=0.1)
        time.sleep(0.2)
        with pytest.raises(NotFound, match="idle"):
            client.session("expired")
        first = client.session("trimmed").first_position
        assert first > 0
        gone = {"deleted": range(60), "expired": range(60), "trimmed": range(first)}
        for kind, positions in gone.items():
            wait_until_gone(server.data, kind, positions)
    for how in (signal.SIGKILL, signal.SIGTERM):
        server.restart(how)
        assert [present(server.data, kind, positions) for kind, positions in gone.items()] == [[], [], []]
        assert set(range(first, 60)) <= set(present(server.data, "trimmed", range(60)))
        assert set(range(60)) == set(present(server.data, "kept", range(60)))
