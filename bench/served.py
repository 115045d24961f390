"""Served attends per second beside the naive service's, in one run: `make bench`.

Q 1, D 512, H 8, E 64, k 8, C 32, n 20,000, float32; 32 connections over several sessions. Both servers are
processes of their own, the load comes from a third. Answers are compared with htm-pytorch's first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts
from htm_pytorch import HTMAttention

from htm_service.convert import from_htm_pytorch
from htm_service.models import save_model

DIM, HEADS, DIM_HEAD, TOP_K, CHUNK_SIZE = 512, 8, 64, 8, 32
NUM_QUERIES = 64
"""Different queries, taken in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--length", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory), options)
    print_table(results)
    print(json.dumps(results))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    oracle = HTMAttention(DIM, HEADS, topk_mems=TOP_K, mem_chunk_size=CHUNK_SIZE, dim_head=DIM_HEAD).eval()
    torch.save(oracle.state_dict(), directory / "weights.pt")
    (directory / "models").mkdir()
    save_model(
        directory / "models" / "bench.safetensors",
        *from_htm_pytorch(oracle.state_dict(), heads=HEADS, dim_head=DIM_HEAD, top_k=TOP_K, chunk_size=CHUNK_SIZE),
    )
    torch.manual_seed(1)
    memories = torch.randn(1, options.length, DIM)
    queries = torch.randn(NUM_QUERIES, DIM)
    results: dict[str, Any] = {"cpus": os.cpu_count(), "torch": torch.__version__, **vars(options)}

    with serving(directory) as port:
        client = HTMClient(f"http://127.0.0.1:{port}", timeout=120)
        for number in range(options.sessions):
            client.create_session(f"s{number}", dim=DIM, chunk_size=CHUNK_SIZE, model="bench")
            for part in memories[0].split(5_000):
                client.append(f"s{number}", part)
        with torch.no_grad():
            padded, mask = pad_right(memories)
            expected = oracle(queries[None, :4], padded, mask=mask)[0].numpy()
        got = client.attend("s0", queries[:4]).output
        results["relative_error"] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        assert results["relative_error"] <= 5e-5, results["relative_error"]
        for name, binary in (("binary", True), ("json", False)):
            plan = directory / f"{name}.json"
            calls = []
            for number, query in enumerate(queries):
                session = f"s{number % options.sessions}"
                if binary:
                    call = Codec(binary=True).attend(session, *attend_parts(query))
                    body, kind = call.content or b"", call.headers["Content-Type"]
                else:
                    body, kind = json.dumps({"queries": [query.tolist()]}).encode(), "application/json"
                calls.append((f"/v1/sessions/{session}/attend", kind, body))
            results[name] = load(directory, plan, port, calls, options)
        client.close()

    with naive(directory, options.length) as port:
        body = json.dumps({"queries": [queries[0].tolist()]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/attend", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = np.array(json.load(response)["output"])
        with torch.no_grad():
            expected = oracle(queries[None, :1], memories)[0].numpy()
        assert np.linalg.norm(answer - expected) <= 1e-5 * np.linalg.norm(expected)
        results["naive"] = load(
            directory, directory / "naive.json", port, [("/attend", "application/json", body)], options
        )
    for name in ("binary", "json"):
        results[name]["times_naive"] = results[name]["per_s"] / results["naive"]["per_s"]
    return results


def pad_right(memories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """htm-pytorch pads on the left; padded on the right and masked it agrees with front-anchored chunks."""
    missing = -memories.shape[1] % CHUNK_SIZE
    if not missing:
        return memories, None
    mask = torch.ones(1, memories.shape[1] + missing, dtype=torch.bool)
    mask[:, memories.shape[1] :] = False
    return torch.nn.functional.pad(memories, (0, 0, 0, missing)), mask


def load(
    directory: Path, plan: Path, port: int, calls: list[tuple[str, str, bytes]], options: argparse.Namespace
) -> dict[str, Any]:
    """One run of the load generator, after a short one to warm up."""
    listed = []
    for number, (path, kind, body) in enumerate(calls):
        file = directory / f"{plan.stem}-{number}.body"
        file.write_bytes(body)
        listed.append((path, kind, str(file)))
    plan.write_text(json.dumps(listed))
    answer: dict[str, Any] = {}
    for seconds in (1.0, options.seconds):
        command = [sys.executable, "-m", "bench.load", "--port", str(port), "--requests", str(plan)]
        command += ["--connections", str(options.connections), "--seconds", str(seconds)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[int]:
    """htm-service on SQLite in `directory`."""
    port = free_port()
    command = [sys.executable, "-m", "api", "serve", "--port", str(port), "--data", str(directory / "data")]
    command += ["--models-dir", str(directory / "models")]
    with process(command):
        wait_for(f"http://127.0.0.1:{port}/readyz")
        yield port


@contextlib.contextmanager
def naive(directory: Path, length: int) -> Iterator[int]:
    """The naive service."""
    port = free_port()
    command = [sys.executable, "-m", "bench.naive", "--port", str(port), "--length", str(length)]
    for name, value in (("dim", DIM), ("heads", HEADS), ("dim-head", DIM_HEAD), ("top-k", TOP_K)):
        command += [f"--{name}", str(value)]
    command += ["--chunk-size", str(CHUNK_SIZE), "--weights", str(directory / "weights.pt")]
    with process(command):
        wait_for(f"http://127.0.0.1:{port}/docs")
        yield port


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[None]:
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


def wait_for(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def print_table(results: dict[str, Any]) -> None:
    print(f"{'':10} {'attends/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'x naive':>8} {'load CPU':>9}")
    for name in ("naive", "json", "binary"):
        row = results[name]
        times = row.get("times_naive", 1.0)
        print(
            f"{name:10} {row['per_s']:10.0f} {row['p50_ms']:8.1f} {row['p99_ms']:8.1f} {times:8.1f} "
            f"{row['load_cpu_share']:9.0%}"
        )


if __name__ == "__main__":
    main()
