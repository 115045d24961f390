"""S18: what a fork of a long session costs, in time, on disk and on the device; the engine in this process."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench import scene
from bench.figures import Figure
from bench.scene import Scene, named
from htm_service.engine import Engine

LENGTH, DIM = 1_000_000, 128
NUM_FORKS = 20


async def forks(stage: Scene, quick: bool) -> Figure:
    """Twenty of one session, one after the other, then an attend to each: all as of another length."""
    length = LENGTH // 10 if quick else LENGTH
    tokens, query = scene.make_tokens(length, DIM), torch.randn(1, DIM)
    path = stage.directory / "s18.sqlite3"
    seconds: list[float] = []
    attends: list[float] = []
    async with scene.running_engine(stage, f"sqlite:///{path}") as engine:
        await scene.fill(engine, "s", tokens, "retrieval")
        await engine.compaction.finish()
        await engine.attend(named("s"), scene.asks(query))
        disk, device, keys = _disk_bytes(path), *await _device_bytes(engine)
        for number in range(NUM_FORKS):
            began = time.perf_counter()
            await engine.fork(named("s"), named(f"f{number}"), length - 7 * number)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            await engine.attend(named(f"f{number}"), scene.asks(query))
            attends.append(time.perf_counter() - began)
        more_device, more_keys = await _device_bytes(engine)
        measured = {
            "median_ms": sorted(seconds)[NUM_FORKS // 2] * 1e3,
            "first_attend_ms": max(attends) * 1e3,
            "disk_bytes_each": (_disk_bytes(path) - disk) / NUM_FORKS,
            "page_bytes_each": (more_device - more_keys - device + keys) / NUM_FORKS,
            "key_bytes_each": (more_keys - keys) / NUM_FORKS,
            "loads": (await engine.info()).totals["loads"],
        }
    what = f"ms of the slowest of {NUM_FORKS} forks of {length:,} x {DIM}"
    return Figure("S18", what, max(seconds) * 1e3, 50, at_most=True, unit="ms", measured=measured)


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


async def _device_bytes(engine: Engine) -> tuple[int, int]:
    """Of all, and of keys."""
    totals = (await engine.info()).totals
    return int(totals["device_bytes"]), int(totals["device_key_bytes"])
