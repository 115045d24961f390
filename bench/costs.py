"""S21 and A1: what keys, metrics, events and the accounts of recalls cost an attend over HTTP.

A server with beside one without, both filled alike, one after the other under the same load, in turns.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench.figures import Figure
from bench.over_http import ADMIN_KEY, attends, fill, load, serving
from bench.processes import Call
from bench.scene import LENGTH, Scene, make_tokens

KEYS = ("per_s", "p50_ms", "p99_ms", "loop_us")
TURNS = 7
"""The median of their ratios counts."""


def guarded(stage: Scene, sessions: int, queries: torch.Tensor, seconds: float) -> Figure:
    """S21: attends by a server that asks for keys, measures, and tells its events to one who reads them, beside one
    that does none of it.

    Each has data of its own: a server whose store has keys asks for them.
    """
    tokens, (calls, _) = make_tokens(LENGTH), attends(sessions, queries)
    with (
        serving(stage, "--unmeasured", data="open") as open_port,
        serving(stage, data="guarded", env={"HTM_API_KEY": ADMIN_KEY}) as guarded_port,
    ):
        fill(open_port, sessions, tokens, stage, queries)
        fill(guarded_port, sessions, tokens, stage, queries, api_key=ADMIN_KEY)
        key = {"Authorization": f"Bearer {make_key(guarded_port)}"}
        with_key: list[Call] = [(path, kind, body, key) for path, kind, body, *_ in calls]
        with listening(guarded_port, key) as num_events:
            ratio, measured = beside(stage, (guarded_port, with_key), (open_port, calls), seconds)
            measured["events"] = num_events()
    assert measured["events"], "nobody was told anything"
    return Figure("S21", "attends with keys, metrics and events, beside none", ratio, 0.95, measured=measured)


def accounts(stage: Scene, sessions: int, queries: torch.Tensor, seconds: float) -> Figure:
    """A1: attends by a server that keeps accounts of recalls, beside one that keeps none."""
    tokens, (calls, _) = make_tokens(LENGTH), attends(sessions, queries)
    with (
        serving(stage, data="kept") as kept_port,
        serving(stage, data="none", env={"HTM_RECALLS_PER_SESSION": "0"}) as none_port,
    ):
        for port in (kept_port, none_port):
            fill(port, sessions, tokens, stage, queries)
        ratio, measured = beside(stage, (kept_port, calls), (none_port, calls), seconds)
    return Figure("A1", "attends with accounts of recalls, beside none", ratio, 0.98, measured=measured)


def beside(
    stage: Scene, some: tuple[int, Sequence[Call]], others: tuple[int, Sequence[Call]], seconds: float
) -> tuple[float, dict[str, Any]]:
    """The median ratio of two rates, each of a port and the calls to it, and what the last turn was made of.

    The second of two is favoured or not by what the machine does meanwhile: they change places at each turn. Beside
    the rates the processor time of the event loop for one attend, which other work on the machine moves less.
    """
    ratios: list[float] = []
    loop_us: list[float] = []
    found: dict[str, dict[str, Any]] = {}
    for turn in range(TURNS):
        pair = [("with", *some), ("without", *others)]
        for name, port, calls in pair[:: 1 if turn % 2 else -1]:
            before = loop_seconds(port, calls)
            found[name] = load(stage, port, calls, seconds)
            found[name]["loop_us"] = (loop_seconds(port, calls) - before) / found[name]["all_requests"] * 1e6
        ratios.append(found["with"]["per_s"] / found["without"]["per_s"])
        loop_us.append(found["with"]["loop_us"] - found["without"]["loop_us"])
    measured = {f"{name}_{key}": rate[key] for name, rate in found.items() for key in KEYS}
    measured |= {"least": min(ratios), "most": max(ratios), "loop_us_more": float(np.median(loop_us))}
    return float(np.median(ratios)), measured


def loop_seconds(port: int, calls: Sequence[Call]) -> float:
    """Processor time of a server's event loop so far; asked as `calls` are, with their headers."""
    _, _, _, *headers = calls[0]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/threads", headers=dict(*headers))
    with urllib.request.urlopen(request) as answer:
        return float(json.load(answer)["loop"])


@contextlib.contextmanager
def listening(port: int, headers: dict[str, str]) -> Iterator[Any]:
    """One who reads all events as they come; a call that says how many pieces of text it was sent so far."""
    num_events = 0
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/events?seconds=3600", headers=headers)
    is_over = threading.Event()

    def read() -> None:
        nonlocal num_events
        with urllib.request.urlopen(request, timeout=60) as answer:
            while not is_over.is_set() and (line := answer.readline()):
                num_events += line.startswith(b"data:")

    reader = threading.Thread(target=read, daemon=True)  # it may wait for a heartbeat when all is over
    reader.start()
    try:
        yield lambda: num_events
    finally:
        is_over.set()


def make_key(port: int) -> str:
    """A key of its own, for one caller."""
    body = json.dumps({"name": f"bench-{time.time_ns()}", "role": "read"}).encode()
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/keys", body, headers)
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["key"])
