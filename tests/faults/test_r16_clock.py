"""R16: the wall clock steps, by a day and by months, forward and back: nothing expires early, no lease or key is
misjudged.

The clock is the process's own: `step_clock.c`, preloaded, adds to it what a file says.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from htm_client import HTMClient, NotFound

from bench import cluster
from storage.base import Appended, StoreUnavailable
from storage.resolve import open_store
from tests.faults.conftest import StartServer
from tests.faults.disk import build_shim
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.served.server import ROOT
from tests.storage.contract import append, create

DAY = 86_400
STEPS = (DAY, -DAY, 100 * DAY, 0)
SWEEP_S = 16.0
"""Longer than sessions are let be between two looks for those that expired."""
LEASE_S = 2.0


class SteppedClock:
    """The clock of programs that run in its `environment`."""

    def __init__(self, directory: Path, library: Path) -> None:
        self._file = directory / "step"
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_STEP": str(self._file)}
        self.step(0)

    def step(self, seconds: int) -> None:
        """So much beside the machine's clock from now on."""
        self._file.touch()
        with self._file.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("q", seconds))


@pytest.fixture
def clock() -> Iterator[SteppedClock]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)  # PostgreSQL runs as another user
        library = build_shim(directory, "step_clock.c")
        if library is None:
            pytest.skip("there is no C compiler to build step_clock.c with")
        yield SteppedClock(directory, library)


def test_r16_the_clock_of_a_server_is_stepped(
    start_server: StartServer, tally: Tally, scale: Scale, clock: SteppedClock
) -> None:
    """A session used a second ago, of `ttl_s` 3600, was answered 410 when the clock went a day forward."""
    server = start_server(program="api", environment=clock.environment)
    with HTMClient(server.url) as client:
        for name in ("used", "unseen"):
            client.create_session(name, dim=3, ttl_s=3_600)
            client.append(name, np.eye(3), idempotency_key="first")
        began_at = datetime.now(UTC)
        for number, step in enumerate(STEPS):
            clock.step(step)
            if scale.drains > 1:  # the whole run has the time
                time.sleep(SWEEP_S)
            tally.losses += client.append("used", np.eye(3), idempotency_key="first").length != 3
            tally.losses += client.append("used", np.eye(3)).length != 3 * (number + 2)
            session = client.session("used")
            assert began_at <= datetime.fromisoformat(session.updated_at) <= datetime.now(UTC), (
                "by the clock of the start"
            )
            client.create_session(f"short{number}", dim=3, ttl_s=0.3)
            time.sleep(0.5)
            with pytest.raises(NotFound, match="was idle"):  # idle time goes on, whatever the clock says
                client.session(f"short{number}")
            tally.rounds, tally.faults, tally.requests = number + 1, number + 1, tally.requests + 5
        tally.losses += client.session("unseen").length != 3
        for step in (
            100 * DAY,
            0,
        ):  # after a restart: idle time begins anew, whatever the clock said before and says now
            clock.step(step)
            server.restart(signal.SIGKILL)
            tally.losses += client.session("unseen").length < 3
            client.append("unseen", np.eye(3))
            tally.faults += 1
        client.create_session("short", dim=3, ttl_s=0.3)
        time.sleep(0.5)
        with pytest.raises(NotFound, match="was idle"):
            client.session("short")
    assert tally.losses == 0


HOLDER = """if True:
    import sys
    from storage.resolve import open_store
    store = open_store(sys.argv[1], lease_s=float(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the data at `url`."""
    command = [sys.executable, "-c", HOLDER, url, str(LEASE_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_r16_the_clock_of_postgresql_is_stepped(
    tally: Tally, clock: SteppedClock, postgresql_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day forward, an owner that was alive was overtaken; a day back, a dead one was waited for for a day."""
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    with cluster.made(postgresql_programs) as database:
        for name in clock.environment:
            monkeypatch.delenv(name)
        url = database.url.replace("://", "+psycopg://")
        for step in STEPS[:2]:
            with holder(url) as owner:
                clock.step(step)
                with pytest.raises(StoreUnavailable, match="in use by another server"):
                    open_store(url, lease_s=LEASE_S)
                clock.step(0)
                time.sleep(LEASE_S)  # renewed by the clock as it is
                owner.kill()
                owner.wait()
            clock.step(step)
            began_at = time.monotonic()
            with contextlib.closing(open_store(url, lease_s=LEASE_S)) as store:
                assert LEASE_S / 2 <= time.monotonic() - began_at < 3 * LEASE_S
                assert append(store, create(store, f"session{step}").sid, 1) == Appended(0, 1)
            clock.step(0)
            tally.rounds, tally.faults, tally.requests = tally.rounds + 1, tally.faults + 3, tally.requests + 2
    assert tally.losses == 0
