"""Searches over HTTP: the same answer in every format, every field, what is counted, and that nothing is kept."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from api.wire import safetensors as wire
from tests.api.conftest import Serve, fill
from tests.api.test_errors import check_problem
from tests.api.test_memory_routes import BINARY, unpack

SEARCH, ALL, BATCH = "/v1/sessions/s/search", "/v1/search", "/v1/batch/search"


async def found_by(client: httpx.AsyncClient, **fields: Any) -> list[list[int]]:
    answer = await client.post(SEARCH, json={"queries": [0, 0.6, 0.8], **fields})
    assert answer.status_code == 200, answer.text
    return [[item["position"] for item in row] for row in answer.json()["found"]]


async def test_the_same_in_every_format(client: httpx.AsyncClient) -> None:
    queries = np.array([[0, 0.6, 0.8], [1, 0, 0]], np.float32)
    asked = {"n": 3, "min_score": 0.5, "return": ["payloads", "embeddings"]}
    lists = (await client.post(SEARCH, json={"queries": queries.tolist(), **asked})).json()
    assert lists.keys() == {"found", "embeddings", "length", "chunk_size"}
    assert (lists["length"], lists["chunk_size"]) == (5, 2)
    rows = [[(item["position"], item["chunk"], item["payload"]) for item in row] for row in lists["found"]]
    assert rows == [[(4, 2, None), (2, 1, {"n": 2}), (1, 0, {"n": 1})], [(0, 0, {"n": 0}), (3, 1, {"n": 3})]]
    scores = [[item["score"] for item in row] for row in lists["found"]]
    np.testing.assert_allclose(scores[0], [1, 0.8, 0.6], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [1, 0.6], rtol=1e-6)
    vectors = np.array(lists["embeddings"])
    assert vectors.shape == (2, 3, 3) and vectors[0, 0].tolist() == pytest.approx([0, 0.6, 0.8])
    assert not vectors[1, 2].any()

    b64 = (await client.post(f"{SEARCH}?encoding=b64", json={"queries": queries.tolist(), **asked})).json()
    tensor = b64.pop("embeddings")
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(tensor["b64"]), "<f4").reshape(tensor["shape"]), np.float32(vectors)
    )
    assert b64 == {name: value for name, value in lists.items() if name != "embeddings"}

    answer = await client.post(SEARCH, content=wire.build({"queries": queries}, asked), headers=BINARY)
    tensors, params = unpack(answer.content)
    assert tensors["position"].tolist() == [[4, 2, 1], [0, 3, -1]] and tensors["position"].dtype == np.int64
    np.testing.assert_array_equal(tensors["score"], np.array([scores[0], [*scores[1], 0]], np.float32))
    np.testing.assert_array_equal(tensors["embeddings"], np.float32(vectors))
    assert params == {"length": 5, "chunk_size": 2, "payloads": [[row[2] for row in of] for of in rows]}
    assert answer.headers["x-batch-size"] == "2" and "compute" in answer.headers["server-timing"]


async def test_fields_reach_the_engine(client: httpx.AsyncClient) -> None:
    added = await client.post("/v1/sessions/s/memories", json={"embeddings": [[0, 0.6, 0.7]], "episode": 4})
    assert added.status_code == 200
    assert await found_by(client, n=2) == [[4, 5]]
    assert await found_by(client, exact=True) == [[4, 5, 2, 1, 3, 0]]
    assert await found_by(client, start=1, stop=3) == [[2, 1]]
    assert await found_by(client, mask=[True, False, True], stop=3) == [[2, 0]]
    assert await found_by(client, episodes=[4]) == [[5]]
    assert await found_by(client, episodes=[]) == [[]]
    assert await found_by(client, min_score=0.7, oversample=9, model="retrieval", timeout_ms=9_000) == [[4, 5, 2]]
    bare = (await client.post(SEARCH, json={"queries": [1, 0, 0], "n": 1, "return": []})).json()
    assert bare == {"found": [[{"position": 0, "score": 1.0, "chunk": 0}]], "length": 6, "chunk_size": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 1_001},
        {"n": "3"},
        {"oversample": 0},
        {"oversample": 101},
        {"min_score": "high"},
        {"exact": 1},
        {"return": ["output"]},
        {"return": ["tokens"]},
        {"top_k": 3},
        {"note": "why"},
        {"stop": [1]},
        {"stop": 99},
        {"mask": [True]},
        {"mask": [0.5] * 5},
        {"queries": [1, 0]},
        {"queries": [[1, 0, None]]},
        {"queries": None},
        {"timeout_ms": 0},
        {"sessions": ["s"]},
    ],
    ids=str,
)
async def test_wrong_fields_are_told(client: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    check_problem(await client.post(SEARCH, json={"queries": [1, 0, 0], **wrong}), 422, "invalid_argument")
    if wrong.keys() & {"note", "top_k", "n", "exact", "return", "queries"}:
        body = {"queries": [1, 0, 0], "sessions": ["s"], **wrong}
        check_problem(await client.post(ALL, json=body), 422, "invalid_argument")


async def test_several_sessions(client: httpx.AsyncClient) -> None:
    await fill(client, "t")
    assert (await client.patch("/v1/sessions/t", json={"labels": {"user": "ana"}})).status_code == 200
    asked = {"queries": [[0, 0.6, 0.8], [1, 0, 0]], "n": 3, "return": ["payloads", "embeddings"]}
    lists = (await client.post(ALL, json={**asked, "sessions": ["t", "s"]})).json()
    assert lists.keys() == {"found", "embeddings", "num_sessions"} and lists["num_sessions"] == 2
    rows = [[(item["session"], item["position"], item["payload"]) for item in row] for row in lists["found"]]
    assert rows[0] == [("t", 4, None), ("s", 4, None), ("t", 2, {"n": 2})]
    assert rows[1] == [("t", 0, {"n": 0}), ("s", 0, {"n": 0}), ("t", 3, {"n": 3})]
    assert np.array(lists["embeddings"]).shape == (2, 3, 3)
    body = wire.build(
        {"queries": np.array([[0, 0.6, 0.8], [1, 0, 0]], np.float32)}, {**asked, "queries": None, "prefix": "t"}
    )
    tensors, params = unpack((await client.post(ALL, content=body, headers=BINARY)).content)
    assert [item["position"] for item in params["found"][1]] == [0, 3, 1] and tensors["embeddings"].shape == (2, 3, 3)
    by_label = {**asked, "label": {"user": "ana"}}
    assert {item["session"] for row in (await client.post(ALL, json=by_label)).json()["found"] for item in row} == {"t"}
    none = (await client.post(ALL, json={"queries": [1, 0, 0], "label": {"user": "bob"}})).json()
    assert none == {"found": [[]], "num_sessions": 0}
    for wrong in (
        {},
        {"sessions": ["s"], "prefix": "s"},
        {"sessions": "s"},
        {"sessions": ["s"], "start": 1},
        {"label": ["a"]},
    ):
        answer = await client.post(ALL, json={"queries": [1, 0, 0], **wrong})
        check_problem(answer, 422, "invalid_argument")


async def test_many_sessions_in_every_format(client: httpx.AsyncClient) -> None:
    await fill(client, "t")
    queries = np.array([[[0, 0.6, 0.8]], [[1, 0, 0]], [[1, 0, 0]]], np.float32)
    body = {"sessions": ["s", "t", "nobody"], "n": 2, "min_score": 0.7, "return": ["payloads", "embeddings"]}
    lists = (await client.post(BATCH, json={**body, "queries": queries.tolist()})).json()
    assert lists["status"] == [200, 200, 404] and lists["errors"][0]["code"] == "session_not_found"
    assert lists["length"] == [5, 5, 0] and lists["chunk_size"] == [2, 2, 0]
    found = [[[(item["position"], item["payload"]) for item in row] for row in of] for of in lists["found"]]
    assert found == [[[(4, None), (2, {"n": 2})]], [[(0, {"n": 0})]], [[]]]
    content = wire.build({"queries": queries}, body)
    tensors, params = unpack((await client.post(BATCH, content=content, headers=BINARY)).content)
    assert tensors["position"].tolist() == [[[4, 2]], [[0, -1]], [[-1, -1]]]
    np.testing.assert_allclose(tensors["score"].ravel(), [1, 0.8, 1, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(tensors["embeddings"], np.array(lists["embeddings"], np.float32))
    assert tensors["embeddings"].shape == (3, 1, 2, 3) and not tensors["embeddings"][2].any()
    assert params["payloads"] == [[[None, {"n": 2}]], [[{"n": 0}]], [[]]] and params["status"] == lists["status"]
    mask = [[True] * 4 + [False], [False] + [True] * 4]
    masked = await client.post(BATCH, json={**body, "sessions": ["s", "t"], "queries": [[0, 0, 1]] * 2, "mask": mask})
    assert [[item["position"] for item in of[0]] for of in masked.json()["found"]] == [[2], [2, 4]]
    none = (await client.post(BATCH, json={"sessions": ["a", "b"], "queries": [[1, 0, 0]] * 2})).json()
    assert none["found"] == [[[]], [[]]] and "embeddings" not in none
    several: list[dict[str, Any]] = [
        {"n": 0},
        {"stop": [1, 2]},
        {"model": 3},
        {"top_k": 1},
        {"queries": [[1, 0, 0]]},
        {"sessions": []},
    ]
    for wrong in several:
        answer = await client.post(BATCH, json={"sessions": ["s", "t"], "queries": [[1, 0, 0]] * 2, **wrong})
        if wrong == {"n": 0}:
            assert answer.json()["status"] == [422, 422]
        else:
            check_problem(answer, 422, "invalid_argument")


@pytest.mark.parametrize("n", [0, -1, 10**12])
async def test_a_batch_of_which_all_fail_is_as_wide_as_nothing(client: httpx.AsyncClient, n: int) -> None:
    """An n below 0, or as large as no memory is, was answered 500: what failed had been given n places each."""
    body = {"sessions": ["s", "nobody"], "n": n, "return": ["payloads", "embeddings"]}
    queries = np.ones((2, 3), np.float32)
    answer = await client.post(BATCH, content=wire.build({"queries": queries}, body), headers=BINARY)
    tensors, params = unpack(answer.content)
    assert params["status"] == [422, 404] and f"n is {n}, it must be 1 to 1000" in params["errors"][0]["detail"]
    assert tensors["position"].shape == tensors["score"].shape == (2, 1, 0)
    assert tensors["embeddings"].shape == (2, 1, 0, 3) and params["payloads"] == [[[]], [[]]]
    lists = (await client.post(BATCH, json={**body, "queries": queries.tolist()})).json()
    assert lists["status"] == [422, 404] and lists["found"] == lists["embeddings"] == [[[]], [[]]]


async def test_what_is_counted(serve: Serve) -> None:
    """A search is no recall, and is counted as one search however many sessions it goes through."""
    async with serve(recalls_per_session=8, payload_cache_bytes=1 << 20, oversample=7) as client:
        await fill(client)
        await fill(client, "t")
        await found_by(client)
        assert (await client.post(ALL, json={"queries": [[1, 0, 0]] * 2, "sessions": ["s", "t"]})).status_code == 200
        info = (await client.get("/v1/info")).json()
        totals, limits = info["totals"], info["limits"]
        assert (totals["searches"], totals["searched_queries"], totals["attends"]) == (2, 3, 0)
        assert totals["payload_cache_hits"] == 15 and totals["payload_cache_misses"] == 0
        assert totals["payload_cache_bytes"] == 10 * 150 + 8 * len('{"n":0}') and totals["device_sketch_bytes"] == 0
        assert limits["oversample"] == 7 and limits["payload_cache_bytes"] == 1 << 20 and limits["max_found"] == 1_000
        session = (await client.get("/v1/sessions/s")).json()
        assert session["num_attends"] == session["num_queries"] == 0
        assert (await client.get("/v1/sessions/s/recalls")).json()["recalls"] == []
        text = (await client.get("/metrics")).text
        assert "htm_searched_queries_total 3.0" in text and 'htm_bytes{tier="device_sketches"} 0.0' in text
        assert "htm_payload_cache_hits_total 15.0" in text and 'htm_waiting{queue="payloads"} 0.0' in text


async def test_sketches_are_counted_once_a_session_is_searched(serve: Serve) -> None:
    async with serve() as client:
        tokens = np.random.default_rng(3).standard_normal((640, 128)).astype(np.float32)
        await client.put("/v1/sessions/w", json={"dim": 128})
        body = wire.build({"embeddings": tokens}, {})
        assert (await client.post("/v1/sessions/w/memories", content=body, headers=BINARY)).status_code == 200
        assert (await client.get("/v1/info")).json()["totals"]["device_sketch_bytes"] == 0
        for _ in range(3):
            answer = await client.post("/v1/sessions/w/search", json={"queries": tokens[77].tolist(), "n": 1})
            assert answer.json()["found"][0][0]["position"] == 77
        totals = (await client.get("/v1/info")).json()["totals"]
        assert 640 * (128 / 8 + 4) <= totals["device_sketch_bytes"] < totals["device_key_bytes"]


async def test_payloads_without_the_cache(serve: Serve) -> None:
    async with serve(payload_cache_bytes=0) as client:
        await fill(client)
        answer = (await client.post(SEARCH, json={"queries": [0, 1, 0], "n": 2})).json()
        assert [item["payload"] for item in answer["found"][0]] == [{"n": 1}, {"n": 3}]
        totals = (await client.get("/v1/info")).json()["totals"]
        assert totals["payload_cache_bytes"] == 0 and totals["payload_cache_misses"] == 2
