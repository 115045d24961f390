"""Servers and the load generator as processes of their own.

Does not know what is served, nor what the rates are compared with.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Call = tuple[str, str, bytes] | tuple[str, str, bytes, Mapping[str, str]]
"""Path, content type, body, and perhaps more headers. `bench.load.MARK` in it becomes a number that comes once."""


def load(
    directory: Path, port: int, calls: Sequence[Call], seconds: float, connections: int, warm_s: float = 1.0
) -> dict[str, Any]:
    """What `bench.load` says of one run, after one to warm up, and `all_requests`, the number in both.

    `directory` is for its files.
    """
    listed = []
    for number, (path, kind, body, *headers) in enumerate(calls):
        file = directory / f"{number}.body"
        file.write_bytes(body)
        listed.append((path, kind, str(file), *map(dict, headers)))
    plan = directory / "plan.json"
    plan.write_text(json.dumps(listed))
    answers: list[dict[str, Any]] = []
    for length in filter(None, (warm_s, seconds)):
        command = [sys.executable, "-m", "bench.load", "--port", str(port), "--requests", str(plan)]
        command += ["--connections", str(connections), "--seconds", str(length)]
        answers.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return {**answers[-1], "all_requests": sum(answer["requests"] for answer in answers)}


@contextlib.contextmanager
def process(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A process that is asked to stop at the end; `env` is added to this one's environment."""
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


def wait_for(url: str) -> None:
    """Wait until there is an answer. Raises TimeoutError after a minute."""
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
