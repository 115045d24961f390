"""S21 and A1: what keys, metrics, events and the accounts of recalls cost an attend over HTTP.

One server works with and without them in turns, while the load goes on: two servers that do the same are up to a tenth
apart, for as long as they run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from bench.figures import Figure
from bench.over_http import ADMIN_KEY, attends, fill, load, serving
from bench.processes import Call
from bench.scene import LENGTH, Scene, make_tokens

TURN_S = 0.25
WARM = 1_000
"""Attends before it begins."""
MEASURED = 0.8
"""Of the load's time."""


def guarded(stage: Scene, sessions: int, queries: torch.Tensor, seconds: float) -> Figure:
    """S21: attends while keys are asked for, requests are measured, and all events are told to one who reads them,
    beside none of it. The callers send their key all the time.
    """
    with serving(stage, "--switched", "guard", data="guard", env={"HTM_API_KEY": ADMIN_KEY}) as port:
        fill(port, sessions, make_tokens(LENGTH), stage, queries, api_key=ADMIN_KEY)
        key = {"Authorization": f"Bearer {make_key(port)}"}
        calls: list[Call] = [(path, kind, body, key) for path, kind, body, *_ in attends(sessions, queries)[0]]
        with listening(port, key) as num_events:
            ratio, measured = beside(stage, port, calls, seconds)
            measured["events"] = num_events()
    assert measured["events"], "nobody was told anything"
    return Figure("S21", "attends with keys, metrics and events, beside none", ratio, 0.95, measured=measured)


def accounts(stage: Scene, sessions: int, queries: torch.Tensor, seconds: float) -> Figure:
    """A1: attends while accounts of recalls are kept, beside none."""
    with serving(stage, "--switched", "accounts", data="accounts") as port:
        fill(port, sessions, make_tokens(LENGTH), stage, queries)
        ratio, measured = beside(stage, port, attends(sessions, queries)[0], seconds)
    return Figure("A1", "attends with accounts of recalls, beside none", ratio, 0.98, measured=measured)


def beside(stage: Scene, port: int, calls: list[Call], seconds: float) -> tuple[float, dict[str, Any]]:
    """The median ratio of the rates with and without, of pairs of turns, and what they were made of.

    Who is first changes from pair to pair. Beside the rates the processor time of the event loop for one attend, which
    other work on the machine moves less.
    """
    rates: dict[bool, list[float]] = {True: [], False: []}
    loop_us: dict[bool, list[float]] = {True: [], False: []}
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, stage, port, calls, seconds, warm_s=0)
        began = switch(port, calls, is_on=False)
        while switch(port, calls, is_on=False)["attends"] - began["attends"] < WARM:
            time.sleep(TURN_S)
        ends_at = time.monotonic() + seconds * MEASURED
        for turn in itertools.count():
            is_with = turn % 4 in (0, 3)
            if turn % 2 == 0 and time.monotonic() > ends_at:
                break
            before = switch(port, calls, is_with)
            time.sleep(TURN_S)
            after = switch(port, calls, is_with)
            num_attends = after["attends"] - before["attends"]
            rates[is_with].append(num_attends / (after["at"] - before["at"]))
            loop_us[is_with].append((after["loop_s"] - before["loop_s"]) / num_attends * 1e6)
        measured = {name: loaded.result()[name] for name in ("p50_ms", "p99_ms")}
    ratios = np.array(rates[True]) / np.array(rates[False])
    measured |= {"with_per_s": float(np.median(rates[True])), "without_per_s": float(np.median(rates[False]))}
    measured |= {"with_loop_us": float(np.median(loop_us[True])), "without_loop_us": float(np.median(loop_us[False]))}
    measured |= {"pairs": len(ratios), "uncertain_by": float(ratios.std() / len(ratios) ** 0.5)}
    return float(np.median(ratios)), measured


def switch(port: int, calls: list[Call], is_on: bool) -> dict[str, float]:
    """Have the server go on with or without; its attends and its event loop's seconds so far, and when that was."""
    _, _, _, *headers = calls[0]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/switch?on={int(is_on)}", headers=dict(*headers))
    with urllib.request.urlopen(request) as answer:
        found: dict[str, float] = json.load(answer)
        return found


@contextlib.contextmanager
def listening(port: int, headers: dict[str, str]) -> Iterator[Callable[[], int]]:
    """One who reads all events as they come; a call that says how many these were."""
    num_events = 0
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/events?seconds=3600", headers=headers)
    is_over = threading.Event()

    def read() -> None:
        nonlocal num_events
        with urllib.request.urlopen(request, timeout=60) as answer:
            while not is_over.is_set() and (line := answer.readline()):
                num_events += line.startswith(b"data:")

    threading.Thread(target=read, daemon=True).start()  # it may wait for a heartbeat when all is over
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
