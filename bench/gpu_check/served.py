"""Attends a second over HTTP on a device, and the share of the time that the device works: `--device cuda`.

The share is what `nvidia-smi` says while the load runs; without it, it is not told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import processes
from bench.gpu_check.parity import CHUNK_SIZE, make_model, serving
from bench.processes import Call

DIM, CONNECTIONS, NUM_QUERIES, PIECE = 512, 32, 64, 5_000


def measure(device: str, sessions: int, length: int, seconds: float, budget: int) -> dict[str, Any]:
    """Fill sessions, load the server, ask how busy the device is meanwhile."""
    draw = np.random.default_rng(1)
    tokens = draw.standard_normal((length, DIM)).astype(np.float32)
    queries = draw.standard_normal((NUM_QUERIES, DIM)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        make_model(folder / "models", DIM)
        with serving(folder, device, budget) as url:
            with HTMClient(url, timeout=120) as client:
                for number in range(sessions):
                    name = f"s{number}"
                    client.create_session(name, dim=DIM, chunk_size=CHUNK_SIZE, dtype="bfloat16", model="random")
                    for first in range(0, length, PIECE):
                        client.append(name, tokens[first : first + PIECE])
                    client.attend(name, queries[:1])
                kernel = client.info()["kernel"]
            calls: list[Call] = []
            for number, query in enumerate(queries):
                call = Codec(binary=True).attend("s", *attend_parts(query))
                target = f"/v1/sessions/s{number % sessions}/attend"
                calls.append((target, call.headers["Content-Type"], call.content or b""))
            port = int(url.rpartition(":")[2])
            with _Utilization() as utilization:
                rates = processes.load(folder, port, calls, seconds, CONNECTIONS)
    keys = ("per_s", "p50_ms", "p99_ms", "mean_batch")
    return {
        "device": device,
        "kernel": kernel,
        "sessions": sessions,
        "tokens_each": length,
        **{f"attends_{key}": rates[key] for key in keys},
        "device_busy_share": utilization.share,
    }


class _Utilization:
    """Asks `nvidia-smi` once a quarter of a second; `share` is the median, or None."""

    def __init__(self) -> None:
        self.share: float | None = None
        self._asking: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Utilization:
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "250"]
            self._asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._asking is None:
            return
        self._asking.terminate()
        said = self._asking.communicate(timeout=10)[0]
        numbers = [float(word) for word in said.split() if word.replace(".", "").isdigit()]
        busy = [number for number in numbers if number > 0]
        self.share = statistics.median(busy) / 100 if busy else None


def main() -> None:
    """As the command says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    print(json.dumps(measure(options.device, sessions=16, length=20_000, seconds=6.0, budget=4 << 30)))


if __name__ == "__main__":
    main()
