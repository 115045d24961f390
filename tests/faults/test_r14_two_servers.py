"""R14: two servers on one data directory: the second refuses to start, and the first does not notice."""

from __future__ import annotations

import signal

import numpy as np
from htm_client import HTMClient

from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.served.forked import ForkedServer


def test_r14_the_second_server_refuses_to_start(start_server: StartServer, tally: Tally) -> None:
    server = start_server()
    with HTMClient(server.url) as client:
        client.create_session("s", dim=3)
        client.append("s", np.eye(3))
        second = ForkedServer(server.data.parent, program="api.cli")
        second.log = server.data.parent / "second.log"
        for _ in range(3):
            second.begin()
            assert second.first_line() == ""
            assert second.wait() == 1
            told = second.log.read_text().splitlines()[-1]
            assert told == f"htm-service: {server.data} is in use by another server, process {server.pid}"
            tally.losses += client.append("s", np.eye(3)).start != 3 * (tally.rounds + 1)
            tally.rounds += 1
    server.end(signal.SIGKILL)
    second.start()  # the lock went with its holder
    with HTMClient(second.url) as client:
        tally.losses += client.session("s").length != 3 * (tally.rounds + 1)
    second.close()
    tally.faults, tally.requests = tally.rounds, tally.rounds + 3
    assert tally.losses == 0
