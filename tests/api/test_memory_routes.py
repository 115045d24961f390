"""The hot calls over HTTP: the same answers in every format, and bad input that changes nothing."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from api.wire import safetensors as wire
from api.wire.tensors import floats, to_base64
from tests.api.conftest import Serve
from tests.api.test_errors import check_problem

ATTEND, MEMORIES, SELECT, STEP = (f"/v1/sessions/s/{name}" for name in ("attend", "memories", "select", "step"))
BINARY = {"content-type": wire.MEDIA_TYPE}
JSON = {"content-type": "application/json"}


def unpack(body: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """An answer's tensors and params, by the library's reader."""
    import safetensors.numpy

    size = int.from_bytes(body[:8], "little")
    params = orjson.loads(orjson.loads(body[8 : 8 + size])["__metadata__"]["params"])
    return safetensors.numpy.load(body), params


async def test_a_session_that_trims_keeps_its_numbers(client: httpx.AsyncClient) -> None:
    settings = {"dim": 3, "chunk_size": 2, "max_tokens": 5, "on_full": "evict_oldest"}
    assert (await client.put("/v1/sessions/w", json=settings)).status_code == 201
    for start in range(0, 12, 4):
        rows = [[float(start + place), 0, 1] for place in range(4)]
        appended = (await client.post("/v1/sessions/w/memories", json={"embeddings": rows})).json()
        assert appended == {"start": start, "length": start + 4, "num_chunks": (start + 4) // 2}
    info = (await client.get("/v1/sessions/w")).json()
    assert (info["first_position"], info["length"], info["bytes"]["stored"]) == (8, 12, 4 * 3 * 4)
    memories = (await client.get("/v1/sessions/w/memories")).json()
    assert memories["start"] == 8 and [row[0] for row in memories["embeddings"]] == [8, 9, 10, 11]
    chunks = (await client.get("/v1/sessions/w/chunks")).json()["chunks"]
    assert [chunk["index"] for chunk in chunks] == [4, 5]
    for answer in (
        await client.get("/v1/sessions/w/chunks/3"),
        await client.post("/v1/sessions/w/attend", json={"queries": [1, 0, 0], "stop": 7}),
        await client.post("/v1/sessions/w/memories", json={"embeddings": [[1, 0, 0]] * 6}),
    ):
        assert answer.status_code in (404, 422) and "trim" in answer.json()["detail"]


async def test_a_fork_and_a_truncation(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/sessions/s/fork", json={"id": "f", "length": 3, "labels": {"try": "2"}})
    assert made.status_code == 201 and made.headers["location"] == "/v1/sessions/f"
    assert (made.json()["length"], made.json()["labels"], made.json()["chunk_size"]) == (3, {"try": "2"}, 2)
    named_by_server = await client.post("/v1/sessions/s/fork", json={})
    assert named_by_server.headers["location"] == f"/v1/sessions/{named_by_server.json()['id']}"
    cut = await client.post("/v1/sessions/s/truncate", json={"length": 1, "if_length": 5})
    assert (cut.status_code, cut.json()) == (200, {"length": 1, "num_chunks": 1})
    assert len((await client.get("/v1/sessions/f/memories")).json()["embeddings"]) == 3
    for path, body, status, code in (
        ("s/fork", {"id": "f"}, 409, "session_conflict"),
        ("s/fork", {"length": 2}, 422, "invalid_argument"),
        ("s/fork", {"length": -1}, 422, "invalid_argument"),
        ("s/fork", {"id": ".."}, 422, "invalid_argument"),
        ("s/truncate", {}, 422, "invalid_argument"),
        ("s/truncate", {"length": 2}, 422, "invalid_argument"),
        ("s/truncate", {"length": 0, "if_length": 5}, 409, "length_conflict"),
        ("none/fork", {}, 404, "session_not_found"),
        ("none/truncate", {"length": 0}, 404, "session_not_found"),
    ):
        refused = await client.post(f"/v1/sessions/{path}", json=body)
        assert (refused.status_code, refused.json()["code"]) == (status, code), (path, body)
    assert (await client.get("/v1/sessions/s")).json()["length"] == 1


async def test_attend_answers_the_same_in_every_format(client: httpx.AsyncClient) -> None:
    queries = np.array([[1, 0, 0], [0, 0.6, 0.8]], np.float32)
    asked = {"top_k": 2, "return": ["output", "chunks", "tokens"]}
    lists = (await client.post(ATTEND, json={"queries": queries.tolist(), **asked})).json()
    assert lists.keys() == {"output", "chunks", "recalled", "length"}
    assert lists["length"] == 5
    assert [len(row) for row in lists["chunks"]["index"]] == [2, 2]
    for row in lists["recalled"]:
        assert sum(item["weight"] for item in row) == pytest.approx(1, abs=1e-5)
        assert row[0].keys() == {"position", "weight", "score", "chunk"}

    b64 = (await client.post(f"{ATTEND}?encoding=b64", json={"queries": to_base64(queries), **asked})).json()
    np.testing.assert_array_equal(floats("o", b64["output"]), np.float32(lists["output"]))
    index = np.frombuffer(base64.b64decode(b64["chunks"]["index"]["b64"]), "<i8").reshape(2, 2)
    assert index.tolist() == lists["chunks"]["index"]

    body = wire.build({"queries": queries}, asked)
    answer = await client.post(ATTEND, content=body, headers=BINARY)
    assert answer.headers["content-type"] == wire.MEDIA_TYPE
    tensors, params = unpack(answer.content)
    np.testing.assert_array_equal(tensors["output"], np.float32(lists["output"]))
    assert tensors["chunks.index"].dtype == np.int64
    np.testing.assert_array_equal(tensors["chunks.index"], lists["chunks"]["index"])
    np.testing.assert_allclose(tensors["chunks.weight"], lists["chunks"]["weight"])
    assert params == {"length": 5, "recalled": lists["recalled"]}

    mixed = await client.post(ATTEND, content=body, headers={**BINARY, "accept": "application/json"})
    assert mixed.json() == lists


async def test_only_what_return_asks_for(client: httpx.AsyncClient) -> None:
    usual = (await client.post(ATTEND, json={"queries": [1, 0, 0]})).json()
    assert usual.keys() == {"output", "length"}
    nothing = (await client.post(ATTEND, json={"queries": [1, 0, 0], "return": []})).json()
    assert nothing == {"length": 5}
    chunks = (await client.post(ATTEND, json={"queries": [1, 0, 0], "return": ["chunks"]})).json()
    assert chunks.keys() == {"chunks", "length"}
    full = (await client.post(ATTEND, json={"queries": [1, 0, 0], "return": ["payloads"], "max_recalled": 5})).json()
    assert full.keys() == {"recalled", "length"}
    found = {item["position"]: item["payload"] for item in full["recalled"][0]}
    assert found == {0: {"n": 0}, 1: {"n": 1}, 2: {"n": 2}, 3: {"n": 3}, 4: None}


async def test_select_answers_the_same_in_every_format(client: httpx.AsyncClient) -> None:
    queries = np.array([[1, 0, 0], [0, 0.6, 0.8]], np.float32)
    lists = (await client.post(SELECT, json={"queries": queries.tolist(), "top_k": 2, "start": 1})).json()
    assert lists.keys() == {"chunks", "unique", "length"} and lists["length"] == 5
    assert lists["unique"].keys() == {"index", "key", "tokens", "visible"}
    tokens = np.array((await client.get(MEMORIES)).json()["embeddings"], np.float32)
    for index, rows, visible in zip(*(lists["unique"][name] for name in ("index", "tokens", "visible")), strict=True):
        for slot in range(2):
            position = 2 * index + slot
            assert visible[slot] == (1 <= position < 5)
            np.testing.assert_array_equal(np.float32(rows[slot]), tokens[position] if visible[slot] else np.zeros(3))

    b64 = (
        await client.post(f"{SELECT}?encoding=b64", json={"queries": queries.tolist(), "top_k": 2, "start": 1})
    ).json()
    found = b64["unique"]["tokens"]
    assert found["shape"] == [len(lists["unique"]["index"]), 2, 3] and b64["unique"]["visible"]["dtype"] == "bool"
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(found["b64"]), "<f4").reshape(found["shape"]),
        np.float32(lists["unique"]["tokens"]),
    )

    body = wire.build({"queries": queries}, {"top_k": 2, "start": 1})
    tensors, params = unpack((await client.post(SELECT, content=body, headers=BINARY)).content)
    assert params == {"length": 5} and tensors["unique.index"].dtype == np.int64
    for place, name in [("chunks", "index"), ("chunks", "logit"), *(("unique", name) for name in lists["unique"])]:
        np.testing.assert_array_equal(tensors[f"{place}.{name}"], np.array(lists[place][name]).astype(np.float32))

    for wanted, keys in (
        (["chunks"], set()),
        (["keys"], {"index", "key"}),
        (["tokens"], {"index", "tokens", "visible"}),
    ):
        answer = (await client.post(SELECT, json={"queries": [1, 0, 0], "return": wanted})).json()
        assert ("chunks" in answer) == (wanted == ["chunks"]) and answer.get("unique", {}).keys() == keys
    for wrong in ({"return": ["output"]}, {"model": "retrieval"}, {"note": "why"}, {"top_k": 0}):
        check_problem(await client.post(SELECT, json={"queries": [1, 0, 0], **wrong}), 422, "invalid_argument")
    assert (await client.get("/v1/sessions/s/recalls")).json()["recalls"] == []


async def test_fields_reach_the_engine(client: httpx.AsyncClient) -> None:
    masked = {"queries": [1, 0, 0], "return": ["tokens"], "mask": [False, True, True, True, True]}
    assert 0 not in await positions(client, masked)
    assert await positions(client, {**masked, "mask": None, "start": 2, "stop": 4}) == {2, 3}
    assert await positions(client, {**masked, "mask": None, "chunk_mask": [[False, False, True]]}) == {4}
    mask = {"b64": base64.b64encode(b"\x00\x01\x00\x00\x00").decode(), "shape": [5], "dtype": "bool"}
    assert await positions(client, {**masked, "mask": mask}) == {1}
    body = wire.build({"queries": np.ones(3, np.float32), "mask": np.eye(5, dtype=bool)[3]}, {"return": ["tokens"]})
    answer = await client.post(ATTEND, content=body, headers=BINARY)
    assert {item["position"] for item in unpack(answer.content)[1]["recalled"][0]} == {3}


async def positions(client: httpx.AsyncClient, body: dict[str, Any]) -> set[int]:
    answer = await client.post(ATTEND, json=body)
    assert answer.status_code == 200, answer.text
    return {item["position"] for item in answer.json()["recalled"][0]}


async def test_appending_and_reading_back_in_every_format(client: httpx.AsyncClient) -> None:
    rows = np.array([[0.1, 0.2, 0.3], [4, 5, 6]], np.float32)
    payloads = [{"text": 'a "quoted" <b>ü</b>', "n": 1.5}, None]
    body = wire.build({"embeddings": rows}, {"payloads": payloads, "if_length": 5, "episode": 2})
    tensors, params = unpack((await client.post(MEMORIES, content=body, headers=BINARY)).content)
    assert (tensors, params) == ({}, {"start": 5, "length": 7, "num_chunks": 4})
    added = await client.post(MEMORIES, json={"embeddings": to_base64(rows), "payloads": payloads})
    assert added.json() == {"start": 7, "length": 9, "num_chunks": 5}

    found = (await client.get(f"{MEMORIES}?start=5")).json()
    assert found.keys() == {"start", "stop", "length", "embeddings", "payloads"}
    assert (found["start"], found["stop"], found["length"]) == (5, 9, 9)
    np.testing.assert_array_equal(np.float32(found["embeddings"]), np.concatenate([rows, rows]))
    assert found["payloads"] == payloads * 2
    assert "embeddings" not in (await client.get(f"{MEMORIES}?include=payloads")).json()
    binary = await client.get(f"{MEMORIES}?start=5&stop=7&include=embeddings", headers={"accept": wire.MEDIA_TYPE})
    tensors, params = unpack(binary.content)
    np.testing.assert_array_equal(tensors["embeddings"], rows)
    assert params == {"start": 5, "stop": 7, "length": 9}


async def test_step_attends_before_it_appends(client: httpx.AsyncClient) -> None:
    attend, append = {"top_k": 3, "return": ["output", "chunks"]}, {"payloads": [{"n": 5}]}
    expected = (await client.post(ATTEND, json={"queries": [1, 0, 0], **attend})).json()
    body = {"attend": {"queries": [1, 0, 0], **attend}, "append": {"embeddings": [1, 0, 0], **append}}
    answer = await client.post(STEP, json=body)
    assert answer.json() == {"attend": expected, "append": {"start": 5, "length": 6, "num_chunks": 3}}
    one = np.array([[1, 0, 0]], np.float32)
    binary = wire.build({"queries": one, "embeddings": one}, {"attend": {**attend, "stop": 5}, "append": append})
    tensors, params = unpack((await client.post(STEP, content=binary, headers=BINARY)).content)
    assert tensors.keys() == {"attend.output", "attend.chunks.index", "attend.chunks.weight"}
    np.testing.assert_array_equal(tensors["attend.output"], np.float32(expected["output"]))
    assert params == {"attend": {"length": 6}, "append": {"start": 6, "length": 7, "num_chunks": 4}}


async def test_headers_say_where_time_went(client: httpx.AsyncClient) -> None:
    answer = await client.post(ATTEND, json={"queries": [1, 0, 0]}, headers={"X-Request-Id": "step-1"})
    parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert parts.keys() == {"queue", "compute", "store"}
    assert float(parts["compute"]) > 0
    assert answer.headers["x-batch-size"] == "1"
    recalls = (await client.get("/v1/sessions/s/recalls?limit=1")).json()["recalls"]
    assert [recall["request_id"] for recall in recalls] == ["step-1"]


async def test_large_bodies_go_through_a_thread(serve: Serve) -> None:
    rows = np.random.default_rng(0).standard_normal((2_000, 67)).astype(np.float32)
    async with serve() as client:
        await client.put("/v1/sessions/s", json={"dim": 67})
        added = await client.post(MEMORIES, json={"embeddings": rows.tolist()})
        assert added.json()["length"] == 2_000
        await client.post(MEMORIES, content=wire.build({"embeddings": rows}, {}), headers=BINARY)
        found = (await client.get(MEMORIES)).json()["embeddings"]
        np.testing.assert_array_equal(np.float32(found), np.concatenate([rows, rows]))


NAN = np.array([[1, np.nan, 0]], np.float32)
BAD: dict[str, tuple[str, Any, int]] = {
    "wrong width": (MEMORIES, {"embeddings": [[1, 2]]}, 422),
    "no tokens": (MEMORIES, {"embeddings": []}, 422),
    "empty tokens": (MEMORIES, {"embeddings": [[], []]}, 422),
    "no embeddings": (MEMORIES, {}, 422),
    "null": (MEMORIES, {"embeddings": None}, 422),
    "nan in base64": (MEMORIES, {"embeddings": to_base64(NAN)}, 422),
    "nan in binary": (MEMORIES, wire.build({"embeddings": NAN}, {}), 422),
    "nan in json": (MEMORIES, b'{"embeddings": [NaN, 1, 2]}', 400),
    "huge shape": (MEMORIES, {"embeddings": {"b64": "AAAA", "shape": [2**40, 3], "dtype": "float32"}}, 422),
    "bad base64": (MEMORIES, {"embeddings": {"b64": "?" * 16, "shape": [1, 3], "dtype": "float32"}}, 400),
    "unknown field": (MEMORIES, {"embeddings": [1, 2, 3], "embedding": 1}, 422),
    "a list": (MEMORIES, [1, 2, 3], 422),
    "truncated": (MEMORIES, wire.build({"embeddings": np.ones((1, 3), np.float32)}, {})[:-1], 400),
    "unknown tensor": (MEMORIES, wire.build({"queries": np.ones((1, 3), np.float32)}, {}), 422),
    "one tensor too many": (
        MEMORIES,
        wire.build({"embeddings": np.ones((1, 3), np.float32), "mask": np.ones(5, bool)}, {}),
        422,
    ),
    "tensor in params": (MEMORIES, wire.build({}, {"embeddings": [1, 2, 3]}), 422),
    "too few payloads": (MEMORIES, {"embeddings": [[1, 2, 3], [4, 5, 6]], "payloads": [{}]}, 422),
    "payload text": (MEMORIES, {"embeddings": [1, 2, 3], "payloads": ["text"]}, 422),
    "payloads object": (MEMORIES, {"embeddings": [1, 2, 3], "payloads": {}}, 422),
    "length of text": (MEMORIES, {"embeddings": [1, 2, 3], "if_length": "5"}, 422),
    "length true": (MEMORIES, {"embeddings": [1, 2, 3], "if_length": True}, 422),
    "durability": (MEMORIES, {"embeddings": [1, 2, 3], "durability": "memory"}, 422),
    "queries missing": (ATTEND, {"top_k": 3}, 422),
    "top_k 0": (ATTEND, {"queries": [1, 0, 0], "top_k": 0}, 422),
    "top_k huge": (ATTEND, {"queries": [1, 0, 0], "top_k": 2**62}, 422),
    "top_k fraction": (ATTEND, {"queries": [1, 0, 0], "top_k": 1.5}, 422),
    "stop beyond": (ATTEND, {"queries": [1, 0, 0], "stop": 6}, 422),
    "start negative": (ATTEND, {"queries": [1, 0, 0], "start": -1}, 422),
    "mask of numbers": (ATTEND, {"queries": [1, 0, 0], "mask": [1, 1, 1, 1, 1]}, 422),
    "mask too short": (ATTEND, {"queries": [1, 0, 0], "mask": [True]}, 422),
    "return": (ATTEND, {"queries": [1, 0, 0], "return": ["outputs"]}, 422),
    "return of lists": (ATTEND, {"queries": [1, 0, 0], "return": [["output"]]}, 422),
    "rank_by": (ATTEND, {"queries": [1, 0, 0], "rank_by": "luck"}, 422),
    "timeout": (ATTEND, {"queries": [1, 0, 0], "timeout_ms": -1}, 422),
    "timeout 0": (ATTEND, {"queries": [1, 0, 0], "timeout_ms": 0}, 422),
    "model": (ATTEND, {"queries": [1, 0, 0], "model": 7}, 422),
    "episodes": (ATTEND, {"queries": [1, 0, 0], "episodes": "all"}, 422),
    "step without append": (STEP, {"attend": {"queries": [1, 0, 0]}}, 422),
    "step attend": (STEP, {"attend": 3, "append": {"embeddings": [1, 2, 3]}}, 422),
    "step unknown": (STEP, {"attend": {"queries": [1, 0, 0], "x": 1}, "append": {"embeddings": [1, 2, 3]}}, 422),
    "step bad append": (STEP, {"attend": {"queries": [1, 0, 0]}, "append": {"embeddings": [1, 2]}}, 422),
    "step bad attend": (STEP, {"attend": {"queries": [1]}, "append": {"embeddings": [1, 2, 3]}}, 422),
    "deep": (MEMORIES, b"[" * 100_000, 400),
    "deep payload": (MEMORIES, b'{"embeddings":[1,2,3],"payloads":[' + b'{"a":' * 255 + b"1" + b"}" * 255 + b"]}", 422),
    "empty": (MEMORIES, b"", 400),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_changes_nothing(client: httpx.AsyncClient, case: str) -> None:
    path, body, status = BAD[case]
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    binary = isinstance(body, bytes) and body[8:9] == b"{"
    answer = await client.post(path, content=content, headers=BINARY if binary else JSON)
    check_problem(answer, status, "malformed_body" if status == 400 else "invalid_argument")
    assert (await client.get("/v1/sessions/s")).json()["length"] == 5


@pytest.mark.parametrize(
    "query", ["start=-1", "stop=6", "start=4&stop=3", "start=x", "start=1.5", f"stop={10**30}", "include=all"]
)
async def test_bad_ranges(client: httpx.AsyncClient, query: str) -> None:
    check_problem(await client.get(f"{MEMORIES}?{query}"), 422, "invalid_argument")


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\t"])
async def test_bad_idempotency_keys(client: httpx.AsyncClient, key: str) -> None:
    headers = {"Idempotency-Key": key}
    answer = await client.post(MEMORIES, json={"embeddings": [1, 2, 3]}, headers=headers)
    check_problem(answer, 422, "invalid_argument")


async def test_the_same_append_said_otherwise_has_the_same_key(client: httpx.AsyncClient) -> None:
    """Keys of a payload in another order made it another request: 422, when a client sent its append again."""
    headers = {"Idempotency-Key": "k"}
    first = b'{"embeddings": [1, 2, 3], "payloads": [{"a": 1, "b": {"c": [2, null], "d": "x"}}]}'
    again = b'{"payloads": [{"b": {"d": "x", "c": [2, null]}, "a": 1}], "embeddings": [[1.0, 2, 3]], "episode": null}'
    answers = [await client.post(MEMORIES, content=body, headers=JSON | headers) for body in (first, again)]
    params = {"payloads": [{"b": {"c": [2, None], "d": "x"}, "a": 1}]}
    binary = wire.build({"embeddings": np.array([1, 2, 3], np.float32)}, params)
    answers.append(
        await client.post(MEMORIES, content=binary, headers={**BINARY, "accept": "application/json", **headers})
    )
    assert [answer.json() for answer in answers] == [answers[0].json()] * 3
    other = first.replace(b"[2, null]", b"[null, 2]")
    check_problem(await client.post(MEMORIES, content=other, headers=JSON | headers), 422, "idempotency_mismatch")


async def test_bad_formats(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{ATTEND}?encoding=xml", json={"queries": [1, 0, 0]})
    check_problem(answer, 422, "invalid_argument")
    answer = await client.post(ATTEND, content=b"{}", headers={**JSON, "content-encoding": "gzip"})
    check_problem(answer, 415, "unsupported_media_type")
    for answer in (await client.post(ATTEND, content=b"{}"), await client.put("/v1/sessions/t", content=b"{}")):
        assert "there is no content type" in check_problem(answer, 415, "unsupported_media_type")["detail"]


async def test_an_answer_beyond_the_limit_is_refused(serve: Serve) -> None:
    async with serve(max_answer_bytes=1024, max_json_body_bytes=1024) as client:
        await client.put("/v1/sessions/s", json={"dim": 67})
        for _ in range(2):
            await client.post(MEMORIES, content=wire.build({"embeddings": np.ones((3, 67), "f4")}, {}), headers=BINARY)
        problem = check_problem(await client.get(MEMORIES), 422, "invalid_argument")
        assert "at most 3 at once" in problem["detail"]
        assert (await client.get(f"{MEMORIES}?stop=3")).status_code == 200


async def test_what_was_trimmed_does_not_count_towards_the_limit_of_an_answer(serve: Serve) -> None:
    """A session that trims could not be read any more once all that it had ever been given passed the limit."""
    async with serve(max_answer_bytes=1024, max_json_body_bytes=1024) as client:
        settings = {"dim": 3, "chunk_size": 2, "max_tokens": 5, "on_full": "evict_oldest"}
        await client.put("/v1/sessions/s", json=settings)
        for _ in range(30):
            await client.post(MEMORIES, json={"embeddings": [[1, 0, 0]] * 4})
        memories = (await client.get(MEMORIES)).json()
        assert (memories["start"], memories["stop"], len(memories["embeddings"])) == (116, 120, 4)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", [JSON, BINARY])
async def test_a_body_of_100_mb(client: httpx.AsyncClient, declared: bool, kind: dict[str, str]) -> None:
    num_sent = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield bytes(1_000_000)

    headers = {**kind, "content-length": "100000000"} if declared else kind
    answer = await client.post(MEMORIES, content=stream(), headers=headers)
    check_problem(answer, 413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert num_sent == 100  # read to its end, so that a client that writes first can read the answer
    assert (await client.get("/v1/sessions/s")).json()["length"] == 5


async def test_a_client_that_waits_for_100_continue_is_not_asked_to_send(client: httpx.AsyncClient) -> None:
    async def stream() -> AsyncIterator[bytes]:
        raise AssertionError("asked for the body")
        yield b""

    headers = {**JSON, "content-length": "100000000", "expect": "100-continue"}
    check_problem(await client.post(MEMORIES, content=stream(), headers=headers), 413, "body_too_large")


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([], "stop is []; it must be an integer, or a list of one for each query"),
        ([1, "2"], "stop is [1, '2']; it must be a list of integers"),
        ([1, 2, 3], "stop has 3 values, there are 2 queries"),
        ([1, 6], "stop is 6, the session's length is 5"),
        ([1, -2], "the lowest stop is -2"),
    ],
)
async def test_a_stop_for_each_query_must_be_one(client: httpx.AsyncClient, stop: Any, message: str) -> None:
    answer = await client.post(ATTEND, json={"queries": [[1, 0, 0], [0, 1, 0]], "stop": stop})
    assert message in check_problem(answer, 422, "invalid_argument")["detail"]
