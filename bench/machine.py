"""What this machine can do at best, the other side of S6 and S7, and what this process's threads take of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def best_of(repeats: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls: what the machine can do when nothing disturbs it."""
    fastest = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def median_of(repeats: int, call: Callable[[], object]) -> float:
    """Seconds of the middle one of some calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def read_bandwidth() -> float:
    """Bytes per second that all cores read together, from memory much larger than the caches."""
    data = torch.ones(128 << 20)  # 512 MiB
    return data.nbytes / best_of(5, data.sum)


def sgemm_rate() -> float:
    """Multiply-adds per second of a float32 matrix product on all cores."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return size**3 / best_of(5, lambda: torch.mm(a, b, out=out))


def thread_seconds() -> dict[str, float]:
    """Processor time of this process's threads, by kind: the event loop's, the device's, the store's, the kernel's
    helpers, and all others by name."""
    kinds = {"MainThread": "loop", "htm-device": "device", "htm-store": "store", "htm-kernel": "helpers"}
    seconds: dict[str, float] = {}
    for thread in threading.enumerate():
        assert thread.ident is not None, "it runs"
        kind = next((kind for name, kind in kinds.items() if name in thread.name), thread.name)
        seconds[kind] = seconds.get(kind, 0.0) + time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return seconds


def raw_log_rate(directory: Path, groups: Sequence[int], record_bytes: int) -> float:
    """Records per second of a plain file: groups of records, each group written and synced as one."""
    record = os.urandom(record_bytes)
    file = os.open(directory / "raw.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        began = time.perf_counter()
        for size in groups:
            os.write(file, record * size)
            os.fdatasync(file)
        return sum(groups) / (time.perf_counter() - began)
    finally:
        os.close(file)
