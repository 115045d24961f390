"""A learner replaces weights under the attends of a real server: each answer is of the weights that it names."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import torch

from htm_service.attention.convert import from_module
from htm_service.attention.model import ProjectedModel
from htm_service.attention.model_file import model_bytes
from htm_service.attention.modules import HTMAttention
from tests.reference import htm_reference, relative_error
from tests.served.server import Server

DIM, SIZE, NUM_TOKENS = 37, 5, 83
FILE = {"Content-Type": "application/x-safetensors"}


class Weights:
    """A model of random weights: its file and hash, and what the definition answers `queries` [Q, D]."""

    def __init__(self, seed: int, tokens: Any, queries: Any) -> None:
        torch.manual_seed(seed)
        config, tensors = from_module(HTMAttention(DIM, heads=3, topk_mems=3, mem_chunk_size=SIZE, dim_head=7))
        self.file = model_bytes(config, tensors)
        self.hash = ProjectedModel(config, tensors).hash
        self.output = htm_reference(queries, tokens, config, tensors).output


@pytest.fixture(params=["sqlite", "postgresql"])
def started(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    options = []
    if request.param == "postgresql":
        options = ["--store-url", request.getfixturevalue("postgresql_url"), "--lease-seconds", "1"]
    server = Server(tmp_path, *options)
    server.start()
    yield server
    server.close()


def read(answer: httpx.Response) -> Any:
    """The output [Q, D] of an attend's answer."""
    if answer.headers["content-type"] == "application/json":
        return np.array(answer.json()["output"], np.float32)
    return safetensors.numpy.load(answer.content)["output"]


def test_two_models_take_turns_under_attends(started: Server) -> None:
    """JSON and binary; none fails, none waits for a swap, the recalls know, and a restart finds the last one."""
    random = np.random.default_rng(1)
    tokens, queries = (random.standard_normal((n, DIM)).astype(np.float32) for n in (NUM_TOKENS, 3))
    made = [Weights(seed, tokens, queries) for seed in (1, 2)]
    by_hash = {one.hash: one for one in made}
    with httpx.Client(base_url=started.url, timeout=60) as client:
        assert client.put("/v1/models/m", content=made[0].file, headers=FILE).status_code == 201
        assert client.put("/v1/sessions/s", json={"model": "m"}).status_code == 201
        assert client.post("/v1/sessions/s/memories", json={"embeddings": tokens.tolist()}).status_code == 200
    seen: list[str] = []
    errors: list[BaseException] = []
    is_done = threading.Event()

    def attend(accept: str) -> None:
        body = {"queries": queries.tolist()}
        with httpx.Client(base_url=started.url, timeout=60) as client:
            while not is_done.is_set():
                answer = client.post("/v1/sessions/s/attend", json=body, headers={"Accept": accept})
                assert answer.status_code == 200, answer.text
                hash_ = answer.headers["x-model-hash"]
                assert relative_error(read(answer), by_hash[hash_].output) <= 1e-5
                seen.append(hash_)

    def kept(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    kinds = ("application/json", "application/x-safetensors") * 3
    threads = [threading.Thread(target=kept, args=(lambda kind=kind: attend(kind),)) for kind in kinds]
    for thread in threads:
        thread.start()
    num_swaps = 0
    with httpx.Client(base_url=started.url, timeout=60) as client:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and not errors:
            num_swaps += 1
            put = client.put("/v1/models/m", content=made[num_swaps % 2].file, headers=FILE)
            assert put.status_code == 200, put.text
            assert put.headers["etag"] == f'"{made[num_swaps % 2].hash}"'
            answer = client.post("/v1/sessions/s/attend", json={"queries": queries.tolist()})
            assert answer.headers["x-model-hash"] == made[num_swaps % 2].hash, "what begins after the answer sees it"
        is_done.set()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert num_swaps > 10 and set(seen) == by_hash.keys()
        recalls = client.get("/v1/sessions/s/recalls").json()["recalls"]
        assert {recall["model_hash"] for recall in recalls} <= by_hash.keys()
        totals = client.get("/v1/info").json()["totals"]
        assert totals["model_swaps"] == num_swaps
        current = made[num_swaps % 2]
    started.restart(signal.SIGKILL)
    with httpx.Client(base_url=started.url, timeout=60) as client:
        (model, _) = client.get("/v1/models").json()["models"]
        assert (model["name"], model["hash"], model["bytes"]) == ("m", current.hash, len(current.file))
        answer = client.post("/v1/sessions/s/attend", json={"queries": queries.tolist()})
        assert relative_error(read(answer), current.output) <= 1e-5
