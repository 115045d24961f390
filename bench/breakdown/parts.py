"""One attend, one append and one second of load, each as a table of parts that add up to the whole.

A part is never what two different runs differ by: all of a table is measured on the same requests, each part within the
next larger one, so that none can be negative.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import over_http, scene
from bench.figures import machine
from bench.processes import Call
from bench.scene import CHUNK_SIZE, DIM, LENGTH, TOP_K, Scene

Part = tuple[str, float]


class Profile(NamedTuple):
    """A table: its heading, its unit, and parts whose figures add up to `total`."""

    title: str
    unit: str
    parts: list[Part]

    @property
    def total(self) -> float:
        """The whole."""
        return sum(figure for _, figure in self.parts)


def one_attend(stage: Scene, quick: bool) -> Profile:
    """One query of one client, from its request to its answer, in microseconds."""
    query = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    with over_http.serving(stage, "--timed", data="one-attend") as port:
        over_http.fill(port, 1, scene.make_tokens(LENGTH), stage, query.expand(4, DIM))
        return of_attend(watch(port, over_http.attends(1, query)[0][0], 50 if quick else 1_000))


def of_attend(seen: Mapping[str, float]) -> Profile:
    """What `watch` saw of attends, as parts."""
    kernel = [seen[f"kernel.{name}"] for name in ("fold", "attend", "project")]
    parts = [
        ("kernel: fold the query", kernel[0]),
        ("kernel: score 625 keys, attend in 8 chunks of 32", kernel[1]),
        ("kernel: project", kernel[2]),
        ("device thread: plan, tensors, results", seen["compute"] - sum(kernel)),
        ("the way to the device thread", seen["queue"]),
        ("event loop: parse, check, account, encode, the way back", seen["server"] - seen["compute"] - seen["queue"]),
        ("sockets, HTTP, the client", seen["client"] - seen["server"]),
    ]
    return Profile("One attend over HTTP, one client", "µs", parts)


def one_search(stage: Scene, quick: bool) -> Profile:
    """One query of one client through all tokens of a session, the best 8 with payloads, in microseconds."""
    tokens = scene.make_clustered(LENGTH)
    query = tokens[LENGTH // 2] + 0.02 * torch.randn(DIM, generator=torch.Generator().manual_seed(2))
    with over_http.serving(stage, "--timed", data="one-search") as port:
        with HTMClient(f"http://127.0.0.1:{port}", timeout=120) as client:
            client.create_session("s", dim=DIM, chunk_size=CHUNK_SIZE)
            client.append("s", tokens, [{"text": f"the token at position {at}"} for at in range(LENGTH)])
            while "on its way" in client.info()["kernel_reason"]:  # the reference serves until it is compiled
                time.sleep(0.5)
            for _ in range(LENGTH // CHUNK_SIZE):  # sketches come by and by
                found = client.search("s", query, 8)
        assert found[0].position == LENGTH // 2, found
        call = Codec(binary=True).search("s", *attend_parts(query, n=8, returns=["payloads"]))
        return of_search(
            watch(port, (call.path, call.headers["Content-Type"], call.content or b""), 50 if quick else 1_000)
        )


def of_search(seen: Mapping[str, float]) -> Profile:
    """What `watch` saw of searches, as parts."""
    parts = [
        ("device thread: the kernel, plan, results", seen["compute"]),
        ("the way to the device thread", seen["queue"]),
        ("event loop: parse, check, payloads, encode, the way back", seen["server"] - seen["compute"] - seen["queue"]),
        ("sockets, HTTP, the client", seen["client"] - seen["server"]),
    ]
    return Profile("One search over HTTP, one client", "µs", parts)


def one_append(stage: Scene, quick: bool) -> Profile:
    """One durable token of one client, in microseconds."""
    token = torch.randn(1, DIM, generator=torch.Generator().manual_seed(3))
    with over_http.serving(stage, "--timed", data="one-append") as port:
        over_http.fill(port, 1, scene.make_tokens(TOP_K * CHUNK_SIZE), stage, token.expand(4, DIM))
        call = over_http.appends(token.expand(over_http.CONNECTIONS, DIM))[0]
        return of_append(watch(port, call, 50 if quick else 1_000))


def of_append(seen: Mapping[str, float]) -> Profile:
    """What `watch` saw of appends, as parts."""
    parts = [
        ("the store: a transaction and its sync", seen["write"]),
        ("the way to the store's thread and back, and to be visible", seen["store"] - seen["write"]),
        ("event loop: parse, check, encode", seen["server"] - seen["store"]),
        ("sockets, HTTP, the client", seen["client"] - seen["server"]),
    ]
    return Profile("One durable append over HTTP, one client", "µs", parts)


def watch(port: int, call: Call, repeats: int) -> dict[str, float]:
    """Means, in microseconds, over the same requests of one client, so that each is contained in the next larger.

    `client` is the whole; `server` what the app took of it; `queue`, `compute` and `store` what its answer says;
    `kernel.*` and `write` what these calls took.
    """
    path, kind, body, *_ = call
    client, told = 0.0, dict[str, float]()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for number in range(-repeats // 5, repeats):
            if number == 0:  # the first fifth warmed everything up
                client, told = 0.0, {}
                _timings(port)
            began = time.perf_counter()
            connection.request("POST", path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            answer.read()
            client += time.perf_counter() - began
            assert answer.status == 200, f"{path} answered {answer.status}"
            for part in (answer.headers["Server-Timing"] or "").split(", "):
                name, _, milliseconds = part.partition(";dur=")
                told[name] = told.get(name, 0.0) + float(milliseconds or 0) / 1e3
    sums = {"client": client, **told, **_timings(port)}
    return {name: seconds / repeats * 1e6 for name, seconds in sums.items()}


def _timings(port: int) -> dict[str, float]:
    """Seconds that the parts of the server took since this was last asked."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/timings") as answer:
        seconds: dict[str, float] = json.load(answer)
    return seconds


def under_load(
    stage: Scene, port: int, what: str, calls: Sequence[Call], quick: bool
) -> tuple[Profile, dict[str, float]]:
    """The processor time of one call of 32 clients, up to all that the cores had; and what the load says."""
    over_http.load(stage, port, calls, 0.5, over_http.CONNECTIONS)
    began, before = time.perf_counter(), _thread_seconds(port)
    found = over_http.load(stage, port, calls, 0.5 if quick else 5.0, over_http.CONNECTIONS)
    after, wall = _thread_seconds(port), time.perf_counter() - began
    number = found["all_requests"]
    spent = {name: (seconds - before.get(name, 0.0)) / number * 1e6 for name, seconds in after.items()}
    parts = [
        ("event loop: HTTP, checks, answers", spent.pop("loop", 0.0)),
        ("device thread: its share of the kernel, plans, results", spent.pop("device", 0.0)),
        ("helper threads: their share of the kernel", spent.pop("helpers", 0.0)),
        ("store thread: SQLite", spent.pop("store", 0.0)),
        ("the server's other threads", sum(spent.values())),
        ("the load generator", found["load_cpu_share"] / found["per_s"] * 1e6),
    ]
    cores = int(machine()["cores"])
    rest = cores * wall / number * 1e6 - sum(figure for _, figure in parts)
    parts.append(("nobody, or what else the machine does", max(0.0, rest)))  # clocks are read one after the other
    return Profile(f"{what} of {over_http.CONNECTIONS} clients, {cores} cores", "µs of processor time", parts), found


def _thread_seconds(port: int) -> dict[str, float]:
    """Processor seconds of the server's threads so far, by kind."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/threads") as answer:
        seconds: dict[str, float] = json.load(answer)
    return seconds
