"""A load generator of its own process: keep-alive connections that post the same bodies over and over.

Raw sockets and hand-made HTTP, so that it is not what is measured.
The mark in a request becomes a number that no other request has, for calls that may not be the same twice.
Prints one JSON line: requests, rates, latencies, its own CPU seconds (to tell that it was not the limit).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MARK = "@@@@@@@@@@@@@@@@"
"""As long as the number that stands in its place, so that Content-Length stays right."""
_MARK = MARK.encode()


class Connection(asyncio.Protocol):
    """Sends a request, waits for the whole answer, sends the next one, until its time is over."""

    def __init__(self, requests: list[bytes], first: int, until: float, numbers: Iterator[int]) -> None:
        self.requests = requests
        self.numbers = numbers
        self.place = first
        self.until = until
        self.latencies: list[float] = []
        self.batch_sizes: list[int] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.WriteTransport | None = None
        self.received = b""
        self.began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Send the next request."""
        assert self.transport is not None
        request = self.requests[self.place % len(self.requests)]
        if _MARK in request:
            request = request.replace(_MARK, b"%016d" % next(self.numbers))
        self.began = time.perf_counter()
        self.transport.write(request)
        self.place += 1

    def data_received(self, data: bytes) -> None:
        """Collect an answer; when it is whole, note it and go on."""
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.received[:end].lower()
        if len(self.received) < end + 4 + int(_header(head, b"content-length")):
            return
        now = time.perf_counter()
        if not head.startswith((b"http/1.1 200", b"http/1.1 201")):
            self.done.set_exception(RuntimeError(self.received.decode(errors="replace")[:500]))
            return
        self.latencies.append(now - self.began)
        self.batch_sizes.append(int(_header(head, b"x-batch-size") or 0))
        self.received = b""
        if now < self.until:
            self.send()
        else:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends early is a failure."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))


def _header(head: bytes, name: bytes) -> bytes:
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        return b""
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else None].strip()


async def run(host: str, port: int, requests: list[bytes], connections: int, seconds: float) -> dict[str, float]:
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    open_ones = []
    numbers = itertools.count(time.time_ns() // 1000)  # so that the next run's are other ones
    for number in range(connections):

        def make(first: int = number) -> Connection:
            return Connection(requests, first, began + seconds, numbers)

        open_ones.append((await loop.create_connection(make, host, port))[1])
    await asyncio.gather(*(connection.done for connection in open_ones))
    wall = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    latencies = np.concatenate([connection.latencies for connection in open_ones])
    return {
        "requests": len(latencies),
        "per_s": len(latencies) / wall,
        "p50_ms": float(np.percentile(latencies, 50)) * 1e3,
        "p99_ms": float(np.percentile(latencies, 99)) * 1e3,
        "mean_batch": float(np.mean(np.concatenate([connection.batch_sizes for connection in open_ones]))),
        "load_cpu_share": (usage.ru_utime + usage.ru_stime) / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--requests",
        type=Path,
        required=True,
        help="JSON: [[path, content type, body file, {header: value} or nothing], ...]",
    )
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    requests = []
    for path, content_type, body_file, *more in json.loads(options.requests.read_text()):
        body = Path(body_file).read_bytes()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
        head += "".join(f"{name}: {value}\r\n" for headers in more for name, value in headers.items())
        head += f"Content-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    print(json.dumps(asyncio.run(run(options.host, options.port, requests, options.connections, options.seconds))))


if __name__ == "__main__":
    main()
