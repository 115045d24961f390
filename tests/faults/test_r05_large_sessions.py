"""R5: a session of a gigabyte goes out of one server and into another: the memory of all three stays where it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from htm_client import HTMClient

from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale

DIM = 128
NUM_EACH = 16_384
"""Tokens of one append: 8 MiB."""
PATIENCE_S = 300
"""The first attend after an import reads the whole session, for its summary keys."""
MAX_GROWTH_MIB = 150.0
"""Of the server, or of the client, above what it had. A fast run's session is below it, and grows by far less."""


class Peak:
    """The most that a process had in memory from now on, less what it has now."""

    def __init__(self, pid: int) -> None:
        self.process = Path(f"/proc/{pid}")
        (self.process / "clear_refs").write_text("5")
        self.base_kib = self.read("VmRSS")

    def read(self, name: str) -> int:
        lines = (self.process / "status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))

    def growth_mib(self) -> float:
        return round((self.read("VmHWM") - self.base_kib) / 1024, 1)


def fill(client: HTMClient, num_mib: int) -> None:
    """A session of so many MiB; every 100th token has a payload."""
    rng = np.random.default_rng(5)
    client.create_session("s", dim=DIM)
    for number in range(num_mib // 8):
        payloads = [{"n": place} if place % 100 == 0 else None for place in range(NUM_EACH)]
        client.append("s", rng.standard_normal((NUM_EACH, DIM), np.float32), payloads, episode=number)


def test_r5_a_session_goes_from_server_to_server_in_constant_memory(
    start_server: StartServer, tally: Tally, scale: Scale, tmp_path: Path
) -> None:
    one, other = start_server(), start_server()
    path = tmp_path / "file"
    with HTMClient(one.url, timeout=PATIENCE_S) as source, HTMClient(other.url, timeout=PATIENCE_S) as target:
        fill(source, scale.session_mib)
        one.restart(signal.SIGTERM)  # what was appended is on the device by and by, which is no export's doing
        server, client, began = Peak(one.pid), Peak(os.getpid()), time.monotonic()
        source.export("s", path)
        out_s, growths = time.monotonic() - began, {"export_server": server, "export_client": client}
        num_mib = path.stat().st_size / (1 << 20)
        tally.figures = {"mib": round(num_mib), "out_mib_s": round(num_mib / out_s)}
        tally.figures |= {f"{name}_mib": peak.growth_mib() for name, peak in growths.items()}
        server, client, began = Peak(other.pid), Peak(os.getpid()), time.monotonic()
        info = target.import_("s", path)
        in_s, growths = time.monotonic() - began, {"import_server": server, "import_client": client}
        tally.figures["in_mib_s"] = round(num_mib / in_s)
        tally.figures |= {f"{name}_mib": peak.growth_mib() for name, peak in growths.items()}
        assert info.length == scale.session_mib // 8 * NUM_EACH and num_mib > scale.session_mib
        too_large = {name: value for name, value in tally.figures.items() if value > MAX_GROWTH_MIB}
        assert set(too_large) <= {"mib", "out_mib_s", "in_mib_s"}, tally.figures
        for stop in (info.length, info.length // 2):
            query = np.random.default_rng(stop).standard_normal(DIM, np.float32)
            asked: Any = {"stop": stop, "returns": ["output", "payloads"], "timeout_ms": PATIENCE_S * 1e3}
            answers = [client.attend("s", query, **asked) for client in (source, target)]
            np.testing.assert_array_equal(answers[0].output, answers[1].output)
            assert answers[0].recalled == answers[1].recalled
        tally.rounds, tally.requests = 1, scale.session_mib // 8 + 6
