"""How long a server takes to answer /livez while something else goes on: asked from a process of its own.

What the machine takes away is not counted: the time in which the server's event loop, or the asking process, could run
and had no core (of Linux, which counts it for every thread). What the server itself holds up is.
"""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import http.client, select, sys, time
port, server = map(int, sys.argv[1:])
def waited():
    found = 0
    for task in f"/proc/{server}/task/{server}", "/proc/thread-self":
        try:
            with open(f"{task}/schedstat") as file:
                found += int(file.read().split()[1])
        except FileNotFoundError:
            pass  # not Linux, or one that does not count
    return found / 1e9
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    began, waited_before = time.perf_counter(), waited()
    connection.request("GET", "/livez")
    assert connection.getresponse().read() == b'{"status":"alive"}'
    took, had_no_core = time.perf_counter() - began, waited() - waited_before
    print(max(took - had_no_core, 0), took)
"""
"""Asks /livez over one connection every 10 ms until stdin is closed, and prints how many seconds each answer took,
without and with what is not counted."""


def start_probe(port: int, server: int) -> subprocess.Popen[str]:
    """Of the process `server`. A process of its own, because this one is busy enough to hold up its threads."""
    command = [sys.executable, "-c", PROBE, str(port), str(server)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end_probe(process: subprocess.Popen[str]) -> list[float]:
    """How many seconds each answer took, the longest last."""
    answered, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    both = [tuple(map(float, line.split())) for line in answered.splitlines()]
    longest = sorted((took for _, took in both), reverse=True)[:5]
    print(f"{len(both)} probes, the longest took {[round(took * 1e3) for took in longest]} ms on the clock")
    return sorted(counted for counted, _ in both)
