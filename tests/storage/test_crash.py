"""`kill -9` in the middle of writing: groups are there whole or not at all, and what was reported done is there."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage.resolve import open_readonly, open_store
from tests.names import named
from tests.storage.crash_writer import IDS, TOKEN_BYTES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_was_reported_done_survives_kill_9(database: str, path: Path, request: pytest.FixtureRequest) -> None:
    """Three rounds on one database."""
    url = f"sqlite:///{path}" if database == "sqlite" else request.getfixturevalue("postgresql_url")
    for round_ in range(3):
        num_reported = _write_and_kill(url, random.Random(round_).uniform(0.02, 0.4))
        if round_ == 1:  # what the killed process left can be checked before a server touches it
            with contextlib.closing(open_readonly(url)) as readonly:
                assert list(readonly.verify()) == []
                assert readonly.totals().num_tokens >= num_reported * len(IDS)
        store = open_store(url)
        try:
            rows = [store.get_session(named(id_)) for id_ in IDS]
            lengths = {row.length for row in rows if row is not None}
            assert len(lengths) == 1, "a group was torn"
            length = lengths.pop()
            assert length >= num_reported
            assert list(store.verify()) == []
            for row in rows:
                assert row is not None
                blocks = list(store.read_blocks(row.sid))
                assert [int.from_bytes(block.data[:4], "big") for block in blocks] == list(range(length))
                assert {len(block.data) for block in blocks} == {TOKEN_BYTES}
                payloads = store.read_payload_range(row.sid, 0, length)
                assert payloads == {position: b"%d" % position for position in range(length)}
        finally:
            store.close()


def _write_and_kill(url: str, seconds: float) -> int:
    """Kill a writer so long after its first report; how many groups it had reported, in all rounds."""
    command = [sys.executable, "-m", "tests.storage.crash_writer", url]
    reported: list[int] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported.append(int(process.stdout.readline()))
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        reported += [int(line) for line in process.stdout if line.endswith(os.linesep)]
        killer.join()
        assert process.wait() == -9
    return reported[-1] + 1
