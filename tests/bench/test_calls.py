"""The client's part of the benchmarks, on a real server: it counts the calls that it makes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from htm_client import HTMClient

from bench import calls
from tests.served.forked import ForkedServer

DIM = 5
TASKS = 3


@pytest.mark.parametrize("kind", sorted(calls.KINDS))
def test_calls_are_counted(tmp_path: Path, kind: str) -> None:
    server = ForkedServer(tmp_path, program="api.cli")
    server.start()
    try:
        with HTMClient(server.url) as client:
            for number in range(TASKS):
                client.create_session(f"s{number}", dim=DIM)
            vector = np.ones(DIM, np.float32)
            one = calls.one_after_the_other(server.url, kind, vector, 0.1)
            many = asyncio.run(calls.side_by_side(server.url, kind, vector, 0.1, TASKS))
            assert one["all_calls"] > calls.WARM_UP and many["all_calls"] > TASKS * calls.WARM_UP
            appended = sum(info.length for info in client.sessions())
            assert appended == (0 if kind == "attend" else one["all_calls"] + many["all_calls"])
            assert min(one["cpu_ms"], one["per_s"], many["cpu_ms"], many["per_s"]) > 0
    finally:
        server.close()
