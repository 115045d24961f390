"""R1: the power goes while the database is made, at the very first start: the next start makes it, or finds it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.base import StoreError
from storage.resolve import DATABASE_NAME, open_store
from tests.faults.disk import build_shim, cut_power, read_log
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.names import named
from tests.served.server import ROOT

STATES_PER_CUT = 2
FIRST_START = """
import sys, time
from storage.resolve import open_store
from tests.storage.contract import create
store = open_store(sys.argv[1])
create(store)
print(time.monotonic(), flush=True)
store.close()
"""


def test_r1_power_lost_while_the_database_is_made(tally: Tally, scale: Scale, tmp_path: Path) -> None:
    """Bug: a rollback journal that was left by that kept the server from starting, as it looked without writing."""
    library = build_shim(tmp_path)
    if library is None:
        pytest.skip("there is no C compiler to build log_writes.c with")
    log, url = tmp_path / "writes.log", f"sqlite:///{tmp_path / 'data' / DATABASE_NAME}"
    done = subprocess.run(
        [sys.executable, "-c", FIRST_START, url],
        env={**os.environ, "LD_PRELOAD": str(library), "LOG_WRITES": str(log)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    created_at = float(done.stdout)
    operations = read_log(log)
    moments = [when + 1e-9 for operation in operations for when in (operation.began_at, operation.ended_at)]
    of_journals = [operation.began_at + 1e-9 for operation in operations if operation.file == 3]
    assert of_journals and max(of_journals) < created_at
    draw = random.Random(7)
    for number in range(STATES_PER_CUT * scale.power_cuts):
        at = draw.choice(of_journals if number % 2 else moments)
        directory = tmp_path / "after"
        directory.mkdir()
        cut_power(operations, at, draw, directory)
        tally.faults += 1
        try:
            with contextlib.closing(open_store(f"sqlite:///{directory / DATABASE_NAME}")) as store:
                is_wrong = bool(list(store.verify())) or (at > created_at and store.get_session(named("a")) is None)
                tally.losses += is_wrong
        except StoreError:
            tally.losses += 1
        shutil.rmtree(directory)
    tally.rounds = tally.requests = tally.faults
    assert tally.losses == 0
