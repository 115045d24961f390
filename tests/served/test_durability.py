"""`durability: memory` and `kill -9`: what is there is a beginning of what was acknowledged."""

import signal

import numpy as np
from htm_client import HTMClient

from tests.served.server import Server

DIM = 17


def tokens(start: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Each token says where it belongs."""
    return np.repeat(np.arange(start, stop, dtype=np.float32)[:, None], DIM, axis=1)


def test_a_durable_append_takes_with_it_what_was_acknowledged_before(server: Server) -> None:
    server.start()
    with HTMClient(server.url) as client:
        client.create_session("s", dim=DIM, chunk_size=7)
        for start in range(0, 60, 3):
            appended = client.append("s", tokens(start, start + 3), durability="memory")
            assert (appended.start, appended.length) == (start, start + 3)
        durable = client.append("s", tokens(60, 61)).length
        for start in range(durable, durable + 60, 3):
            client.append("s", tokens(start, start + 3), durability="memory")
    server.restart(signal.SIGKILL)
    with HTMClient(server.url) as client:
        memories = client.read("s")
    assert memories.length in range(durable, durable + 61, 3)
    np.testing.assert_array_equal(memories.embeddings, tokens(0, memories.length))
    assert server.end(signal.SIGTERM) == 0
