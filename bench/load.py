"""A load generator of its own process: keep-alive connections that post the same bodies over and over.

Raw sockets and hand-made HTTP, because httpx takes longer to send a request than the server to answer it.
Prints one JSON line: requests, seconds, latencies, its own CPU seconds (to tell that it was not the limit).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from pathlib import Path

import numpy as np


async def connection(
    host: str, port: int, requests: list[bytes], first: int, until: float, latencies: list[float]
) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    place = first
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(requests[place % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:20]:
            raise RuntimeError(head.decode())
        low = head.lower()
        start = low.index(b"content-length:") + 15
        await reader.readexactly(int(low[start : low.index(b"\r\n", start)]))
        latencies.append(time.perf_counter() - began)
        place += 1
    writer.close()


async def run(host: str, port: int, requests: list[bytes], connections: int, seconds: float) -> dict[str, float]:
    latencies: list[float] = []
    began = time.perf_counter()
    until = began + seconds
    await asyncio.gather(*(connection(host, port, requests, index, until, latencies) for index in range(connections)))
    wall = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": len(latencies),
        "per_s": len(latencies) / wall,
        "p50_ms": float(np.percentile(latencies, 50)) * 1e3,
        "p99_ms": float(np.percentile(latencies, 99)) * 1e3,
        "load_cpu_share": (usage.ru_utime + usage.ru_stime) / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests", type=Path, required=True, help="JSON: [[path, content type, body file], ...]")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    requests = []
    for path, content_type, body_file in json.loads(options.requests.read_text()):
        body = Path(body_file).read_bytes()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    print(json.dumps(asyncio.run(run(options.host, options.port, requests, options.connections, options.seconds))))


if __name__ == "__main__":
    main()
