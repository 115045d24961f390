"""How long a server takes to answer /livez while something else goes on: asked from a process of its own."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import http.client, select, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    began = time.perf_counter()
    connection.request("GET", "/livez")
    assert connection.getresponse().read() == b'{"status":"alive"}'
    print(time.perf_counter() - began)
"""
"""Asks /livez over one connection every 10 ms until stdin is closed, and prints how many seconds each answer took."""


def start_probe(port: int) -> subprocess.Popen[str]:
    """A process of its own, because this one is busy enough to hold up its threads."""
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def end_probe(process: subprocess.Popen[str]) -> list[float]:
    """How many seconds each answer took, the longest last."""
    answered, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return sorted(map(float, answered.split()))
