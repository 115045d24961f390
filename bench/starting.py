"""S22: from the start of a server's process to its first 200 from /readyz, with nothing kept and later.

While the first one compiles its kernel beside, clients attend, and /livez is asked again and again: how long did it
take at most, and when did the compiled kernel take over?
"""

from __future__ import annotations

import contextlib
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from htm_client import HTMClient

from bench import over_http, processes
from bench.figures import Figure, say

DIM = 128
LENGTH = 20_000
NUM_CLIENTS = 8
LATER_STARTS = 3
MAX_SECONDS = 300
"""For the compiled kernel to take over, on a machine with much else to do."""


def measure(quick: bool) -> list[Figure]:
    """The first start on empty folders, and later ones."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        say("S22: the first start")
        with serving(folder) as (port, first_s):
            found = _until_compiled(folder, port)
        later_s: list[float] = []
        for _ in range(1 if quick else LATER_STARTS):
            say("S22: a later start")
            with serving(folder) as (_, ready_s):
                later_s.append(ready_s)
    first = Figure("S22", "seconds until /readyz, first start on empty folders", first_s, 8, True, "s", found)
    return [
        first,
        Figure("S22", "seconds until /readyz, later starts (median)", statistics.median(later_s), 5, True, "s"),
    ]


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[int, float]]:
    """A server on a folder of its own: its port, and how long it took until it was ready."""
    port = processes.free_port()
    command = [sys.executable, "-m", "api", "serve", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    command += ["--data", str(folder / "data"), "--kernel-cache", str(folder / "kernels")]
    began = time.perf_counter()
    with processes.process(command):
        while not _is_ready(port):
            if time.perf_counter() - began > MAX_SECONDS:
                raise TimeoutError("the server is not ready")
            time.sleep(0.01)
        yield port, time.perf_counter() - began


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _until_compiled(folder: Path, port: int) -> dict[str, float]:
    """Seconds until the compiled kernel serves, and the longest that /livez took until then, with clients attending."""
    tokens = np.random.default_rng(1).standard_normal((LENGTH, DIM)).astype(np.float32)
    with HTMClient(f"http://127.0.0.1:{port}", timeout=60) as client:
        client.create_session("s0", dim=DIM)
        client.append("s0", tokens)
        longest, began, is_over = [0.0], time.perf_counter(), threading.Event()
        poll = threading.Thread(target=_poll, args=(port, longest, is_over))
        attend = threading.Thread(target=_attend, args=(folder, port, is_over))
        poll.start()
        attend.start()
        try:
            while client.info()["kernel"] != "compiled":
                if time.perf_counter() - began > MAX_SECONDS:
                    raise TimeoutError("the compiled kernel did not take over")
                time.sleep(0.1)
            compiled_s = time.perf_counter() - began
            time.sleep(1)  # what the change-over itself takes
        finally:
            is_over.set()
            poll.join()
            attend.join()
    return {"compiled_after_s": compiled_s, "longest_livez_ms": longest[0] * 1e3}


def _attend(folder: Path, port: int, is_over: threading.Event) -> None:
    """Clients that attend again and again, each when it was answered; all in one process, which takes little."""
    calls, _ = over_http.attends(1, torch.ones(1, DIM))
    while not is_over.is_set():
        processes.load(folder, port, calls, 2.0, NUM_CLIENTS)


def _poll(port: int, longest: list[float], is_over: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not is_over.wait(0.01):
        began = time.perf_counter()
        connection.request("GET", "/livez")
        connection.getresponse().read()
        longest[0] = max(longest[0], time.perf_counter() - began)
    connection.close()
