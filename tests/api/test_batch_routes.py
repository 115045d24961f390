"""Lock-step calls over HTTP: the same in every format, errors item by item, and bodies that are wrong as a whole."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from api.wire import safetensors as wire
from api.wire.tensors import to_base64
from tests.api.conftest import ADMIN_KEY, Serve, fill, make_key
from tests.api.test_errors import check_problem
from tests.api.test_memory_routes import unpack

QUERIES = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 0, 1]]], np.float32)
ASKED = {"return": ["output", "chunks", "payloads"], "top_k": 2}


@pytest.fixture
async def three(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The sessions s, t and u, of which the last has one more token."""
    for name in "tu":
        await fill(client, name)
    more = await client.post("/v1/sessions/u/memories", json={"embeddings": [1, 1, 0], "payloads": [{"n": "more"}]})
    assert more.status_code == 200
    return client


async def test_attends_are_those_of_single_calls_in_every_format(three: httpx.AsyncClient) -> None:
    names = ["s", "u", "nobody"]
    answers = []
    for name, queries in zip(names[:2], QUERIES, strict=False):
        body = {"queries": queries.tolist(), **ASKED}
        answers.append(await three.post(f"/v1/sessions/{name}/attend", json=body))
    body = {"sessions": names, **ASKED}
    lists = (await three.post("/v1/batch/attend", json={**body, "queries": QUERIES.tolist()})).json()
    sent = {**body, "queries": to_base64(QUERIES)}
    in_base64 = (await three.post("/v1/batch/attend?encoding=b64", json=sent)).json()
    content = wire.build({"queries": QUERIES}, body)
    binary = await three.post("/v1/batch/attend", content=content, headers={"content-type": wire.MEDIA_TYPE})
    tensors, params = unpack(binary.content)
    assert lists["status"] == in_base64["status"] == params["status"] == [200, 200, 404]
    assert (
        lists["errors"]
        == params["errors"]
        == [{"item": 2, "status": 404, "code": "session_not_found", "detail": "there is no session 'nobody'"}]
    )
    assert lists["length"] == [5, 6, 0] and lists["recalled"][2] == []
    hashes = [answer.headers["x-model-hash"] for answer in answers]
    assert lists["model_hash"] == in_base64["model_hash"] == params["model_hash"] == [*hashes, ""]
    for item, answer in enumerate(answers):
        one = answer.json()
        np.testing.assert_allclose(lists["output"][item], one["output"], atol=1e-6)
        assert lists["chunks"]["index"][item] == one["chunks"]["index"]
        np.testing.assert_allclose(lists["chunks"]["weight"][item], one["chunks"]["weight"], atol=1e-6)
        for row, expected in zip(lists["recalled"][item], one["recalled"], strict=True):
            assert [token["payload"] for token in row] == [token["payload"] for token in expected]
    np.testing.assert_allclose(tensors["output"], lists["output"], atol=1e-6)
    np.testing.assert_array_equal(tensors["chunks.index"], lists["chunks"]["index"])
    assert tensors["chunks.index"].dtype == np.int64 and not tensors["output"][2].any()
    assert in_base64["output"]["shape"] == [3, 2, 3] and in_base64["recalled"] == params["recalled"]
    assert binary.headers["x-batch-size"] == "4", "four queries that were computed together"


async def test_answers_are_as_wide_as_the_widest(client: httpx.AsyncClient) -> None:
    await client.put("/v1/sessions/short", json={"dim": 3, "chunk_size": 2})
    await client.post("/v1/sessions/short/memories", json={"embeddings": [1, 0, 0]})
    body = {"sessions": ["s", "short"], "queries": [[1, 0, 0], [1, 0, 0]], "return": ["chunks"], "top_k": 3}
    answer = (await client.post("/v1/batch/attend", json=body)).json()
    assert [len(rows[0]) for rows in answer["chunks"]["index"]] == [3, 3]
    assert answer["chunks"]["index"][1] == [[0, -1, -1]] and answer["chunks"]["weight"][1] == [[1, 0, 0]]
    none = await client.post(
        "/v1/batch/attend", json={**body, "sessions": ["no", "none"], "return": ["output", "chunks"]}
    )
    assert none.json()["output"] == [[[0, 0, 0]]] * 2 and none.json()["chunks"]["index"] == [[[]]] * 2


async def test_appends_differ_from_item_to_item(three: httpx.AsyncClient) -> None:
    rows = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    body: dict[str, Any] = {
        "sessions": ["s", "t", "u"],
        "num_tokens": [2, 1, 0],
        "payloads": [[{"a": 1}, None], [{"b": 2}, {"not": "there"}], None],
        "episode": [7, None, 8],
        "if_length": [5, None, 6],
    }
    answer = await three.post("/v1/batch/append", json={**body, "embeddings": rows.tolist()})
    assert answer.json() == {
        "status": [200] * 3,
        "errors": [],
        "start": [5, 5, 6],
        "length": [7, 6, 6],
        "num_chunks": [4, 3, 3],
    }
    found = (await three.get("/v1/sessions/t/memories?start=5")).json()
    assert found["embeddings"] == [[6, 7, 8]] and found["payloads"] == [{"b": 2}]
    seen = await three.post("/v1/sessions/s/attend", json={"queries": [1, 0, 0], "episodes": [7], "return": ["tokens"]})
    assert {token["position"] for token in seen.json()["recalled"][0]} == {5, 6}
    again = await three.post(
        "/v1/batch/append",
        content=wire.build({"embeddings": rows}, body),
        headers={"content-type": wire.MEDIA_TYPE, "accept": "application/json"},
    )
    assert again.json()["status"] == [409, 200, 200]
    assert again.json()["errors"][0]["code"] == "length_conflict" and again.json()["errors"][0]["length"] == 7


async def test_steps_attend_to_what_was_there(three: httpx.AsyncClient) -> None:
    attend = {"queries": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "model": ["retrieval", None, "no"], "note": "all of it"}
    append = {"embeddings": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    body = {"sessions": ["s", "t", "u"], "attend": attend, "append": append}
    first = await three.post("/v1/batch/step", json=body, headers={"Idempotency-Key": "k"})
    answer = first.json()
    assert answer["status"] == [200, 200, 404] and answer["errors"][0]["code"] == "model_not_found"
    assert answer["attend"]["length"] == answer["append"]["start"] == [5, 5, 0]
    repeated = await three.post("/v1/batch/step", json=body, headers={"Idempotency-Key": "k"})
    assert repeated.json() == answer
    assert [(await three.get(f"/v1/sessions/{name}")).json()["length"] for name in "stu"] == [6, 6, 6]
    assert (await three.get("/v1/sessions/t/recalls")).json()["recalls"][0]["note"] == "all of it"


async def test_masks_have_the_sessions_in_front(client: httpx.AsyncClient) -> None:
    await fill(client, "t")
    mask = np.array([[True] * 5, [False, True, True, True, True]])
    body = {"sessions": ["s", "t"], "queries": [[1, 0, 0], [1, 0, 0]], "return": ["tokens"], "mask": mask.tolist()}
    answer = (await client.post("/v1/batch/attend", json=body)).json()
    assert [0 in {token["position"] for token in rows[0]} for rows in answer["recalled"]] == [True, False]
    chunk_mask = [[[True, False, True]], [[False, False, True]]]
    body = {**body, "mask": None, "chunk_mask": chunk_mask, "queries": [[[1, 0, 0]], [[1, 0, 0]]], "return": ["chunks"]}
    answer = (await client.post("/v1/batch/attend", json=body)).json()
    assert [sorted(rows[0]) for rows in answer["chunks"]["index"]] == [[-1, 0, 2], [-1, -1, 2]]
    await client.post("/v1/sessions/t/memories", json={"embeddings": [1, 0, 0]})
    longer = (await client.post("/v1/batch/attend", json={**body, "chunk_mask": None, "mask": mask.tolist()})).json()
    assert longer["status"] == [200, 422] and "must be [6]" in longer["errors"][0]["detail"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no sessions": ({"sessions": None}, "sessions is required"),
    "none": ({"sessions": []}, "sessions has 0 ids; it must have 1 to 4096"),
    "a text": ({"sessions": "s"}, "sessions is 's'; it must be a list of session ids"),
    "a number": ({"sessions": ["s", 3]}, "it must be a list of session ids"),
    "twice": ({"sessions": ["s", "s"]}, "sessions has 's' twice"),
    "too many": ({"sessions": [f"s{number}" for number in range(4_097)]}, "sessions has 4097 ids"),
    "of fewer": ({"embeddings": [[1, 0, 0]]}, "embeddings is of 1 sessions, sessions has 2"),
    "flat": ({"embeddings": [1, 0, 0]}, "embeddings[0] is 1"),
    "ragged": ({"embeddings": [[1, 0, 0], [1, 0]]}, "embeddings[1] has shape [2], embeddings[0] has [3]"),
    "deep": ({"embeddings": to_base64(np.zeros((2, 1, 1, 3), np.float32))}, "embeddings has 4 dimensions"),
    "shallow": ({"embeddings": to_base64(np.zeros(2, np.float32))}, "it must have 2 or 3 dimensions"),
    "a null in it": ({"embeddings": [[1, 0, None], [1, 0, 0]]}, "embeddings[0][2] is None"),
    "counts": ({"num_tokens": [1, 2]}, "num_tokens[1] is 2; it must be 0 to 1"),
    "fewer counts": ({"num_tokens": [1]}, "num_tokens is of 1 sessions, sessions has 2"),
    "one count": ({"num_tokens": 1}, "num_tokens is 1; it must be a list, with a value for each session"),
    "payloads": ({"payloads": [[3], None]}, "payloads[0][0] is 3"),
    "an episode": ({"episode": [1, "2"]}, "episode[1] is '2'; it must be an integer"),
    "unknown": ({"embedings": []}, "unknown field embedings"),
    "model": ({"model": "retrieval"}, "unknown field model"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_body_that_is_wrong_as_a_whole_changes_nothing(client: httpx.AsyncClient, case: str) -> None:
    await fill(client, "t")
    changes, message = WRONG[case]
    body = {"sessions": ["s", "t"], "embeddings": [[1, 0, 0], [0, 1, 0]], **changes}
    problem = check_problem(await client.post("/v1/batch/append", json=body), 422, "invalid_argument")
    assert message in problem["detail"]
    assert [(await client.get(f"/v1/sessions/{name}")).json()["length"] for name in "st"] == [5, 5]


async def test_what_belongs_to_one_item_fails_alone(client: httpx.AsyncClient) -> None:
    """Payloads of another number, infinite numbers, an id that is none; a session may be asked twice in an attend."""
    await fill(client, "t")
    body = {
        "sessions": ["s", "t", "a b"],
        "embeddings": [[1, 0, 0], [1e39, 0, 0], [1, 0, 0]],
        "payloads": [[], None, None],
    }
    answer = (await client.post("/v1/batch/append", json=body)).json()
    assert answer["status"] == [422, 422, 422]
    assert ["payloads has 0 entries" in answer["errors"][0]["detail"], "inf" in answer["errors"][1]["detail"]] == [
        True
    ] * 2
    twice = {"sessions": ["s", "s"], "queries": [[1, 0, 0], [1, 0, 0]]}
    answer = (await client.post("/v1/batch/attend", json=twice)).json()
    assert answer["status"] == [200, 200] and answer["output"][0] == answer["output"][1]


async def test_a_large_body_is_parsed_beside_the_event_loop(serve: Serve) -> None:
    """1,024 sessions, 768 KiB of lists: other calls are answered meanwhile, and every item is right."""
    async with serve() as client:
        names = [f"s{number}" for number in range(1_024)]
        for name in names[:40]:
            await client.put(f"/v1/sessions/{name}", json={"dim": 64})
        rows = np.random.default_rng(0).standard_normal((1_024, 64)).round(4)
        answer = await client.post("/v1/batch/append", json={"sessions": names, "embeddings": rows.tolist()})
        assert answer.json()["status"] == [200] * 40 + [404] * 984
        assert len(answer.json()["errors"]) == 984


async def test_items_of_another_namespace_are_not_there(serve: Serve) -> None:
    """R15: ids of others are free in a batch, too: each such item is 404, tells nothing and changes nothing."""
    async with serve(api_key=ADMIN_KEY) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        await fill(client)
        theirs = {"Authorization": f"Bearer {await make_key(client, 'theirs', 'write', namespace='blue')}"}
        assert (await client.put("/v1/sessions/own", json={"dim": 3}, headers=theirs)).status_code == 201
        attend, append = {"queries": [[1, 0, 0]] * 2}, {"embeddings": [[1, 0, 0]] * 2}
        ids = {"sessions": ["s", "own"]}
        for path, body in (
            ("attend", {**ids, **attend}),
            ("append", {**ids, **append}),
            ("step", {**ids, "attend": attend, "append": append}),
            ("select", {**ids, **attend}),
            ("truncate", {**ids, "length": 0}),
        ):
            answer = (await client.post(f"/v1/batch/{path}", json=body, headers=theirs)).json()
            assert answer["status"] == [404, 200]
            assert answer["errors"] == [
                {"item": 0, "status": 404, "code": "session_not_found", "detail": "there is no session 's'"}
            ]
        found = (await client.get("/v1/sessions/s")).json()
        assert (found["length"], found["num_attends"]) == (5, 0)


async def test_a_batch_is_one_request_of_a_keys_rate_and_quotas_count_its_tokens(serve: Serve) -> None:
    async with serve(api_key=ADMIN_KEY) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        for name in "st":
            await fill(client, name)
        slow = await make_key(client, "slow", "write", requests_per_second=1)
        body = {"sessions": ["s", "t"], "embeddings": [[1, 0, 0]] * 2}
        assert (await client.put("/v1/quotas/default", json={"max_tokens": 11})).status_code == 200
        headers = {"Authorization": f"Bearer {slow}"}
        answer = await client.post("/v1/batch/append", json=body, headers=headers)
        assert answer.json()["status"] == [200, 507] and answer.json()["errors"][0]["code"] == "quota_exceeded"
        check_problem(await client.post("/v1/batch/append", json=body, headers=headers), 429, "rate_limited")


async def test_selects_are_those_of_single_calls_in_every_format(three: httpx.AsyncClient) -> None:
    """The sessions take other numbers of chunks, and the last is not there: -1 and 0 beyond what each takes."""
    names, top_k = ["s", "t", "u", "nobody"], {"top_k": 2}
    queries = np.concatenate([QUERIES, QUERIES[:1]])
    queries[1] = queries[1, 0]  # so that both of its queries take the same chunks
    singles = []
    for name, of_session in zip(names[:3], queries, strict=False):
        body = {"queries": of_session.tolist(), **top_k}
        singles.append((await three.post(f"/v1/sessions/{name}/select", json=body)).json())
    body = {"sessions": names, **top_k}
    lists = (await three.post("/v1/batch/select", json={**body, "queries": queries.tolist()})).json()
    content = wire.build({"queries": queries}, body)
    binary = await three.post("/v1/batch/select", content=content, headers={"content-type": wire.MEDIA_TYPE})
    tensors, params = unpack(binary.content)
    assert lists["status"] == params["status"] == [200, 200, 200, 404] and lists["length"] == [5, 5, 6, 0]
    assert lists["errors"] == params["errors"] and lists["errors"][0]["code"] == "session_not_found"
    assert lists["chunk_size"] == params["chunk_size"] == [2, 2, 2, 0]
    width = max(len(one["unique"]["index"]) for one in singles)
    assert min(len(one["unique"]["index"]) for one in singles) == 2 < width
    for item, one in enumerate(singles):
        num_taken = len(one["unique"]["index"])
        assert lists["chunks"]["index"][item] == one["chunks"]["index"]
        np.testing.assert_allclose(lists["chunks"]["logit"][item], one["chunks"]["logit"], atol=1e-6)
        assert lists["unique"]["index"][item] == one["unique"]["index"] + [-1] * (width - num_taken)
        for name in ("key", "tokens", "visible"):
            padded = np.array(lists["unique"][name][item])
            np.testing.assert_allclose(padded[:num_taken], one["unique"][name])
            assert not padded[num_taken:].any()
    assert lists["unique"]["index"][3] == [-1] * width and not np.array(lists["unique"]["tokens"][3]).any()
    for name in ("index", "key", "tokens", "visible"):
        np.testing.assert_allclose(tensors[f"unique.{name}"], lists["unique"][name], atol=1e-6)
    np.testing.assert_array_equal(tensors["chunks.index"], lists["chunks"]["index"])
    named = {**body, "queries": queries.tolist(), "return": ["chunks"]}
    assert "unique" not in (await three.post("/v1/batch/select", json=named)).json()
    keys = {**body, "sessions": ["no", "none"], "queries": [[1, 0, 0]] * 2, "return": ["keys"]}
    assert (await three.post("/v1/batch/select", json=keys)).json()["unique"] == {"index": [[], []], "key": [[], []]}


async def test_start_and_stop_may_have_the_sessions_in_front(three: httpx.AsyncClient) -> None:
    names = ["s", "t", "u"]
    starts, stops = [0, None, 2], [[3, 5], None, [4]]
    body = {"sessions": names, "queries": QUERIES.tolist(), "start": starts, "stop": stops, "top_k": 2}
    attended = (await three.post("/v1/batch/attend", json={**body, "return": ["output", "chunks"]})).json()
    selected = (await three.post("/v1/batch/select", json=body)).json()
    assert attended["status"] == selected["status"] == [200] * 3
    for item, (name, start, stop) in enumerate(zip(names, [0, 0, 2], [[3, 5], None, 4], strict=True)):
        one = {"queries": QUERIES[item].tolist(), "start": start, "stop": stop, "top_k": 2}
        expected = await three.post(f"/v1/sessions/{name}/attend", json={**one, "return": ["output", "chunks"]})
        np.testing.assert_allclose(attended["output"][item], expected.json()["output"], atol=1e-6)
        chunks = (await three.post(f"/v1/sessions/{name}/select", json=one)).json()["chunks"]
        width = len(chunks["index"][0])
        assert [row[:width] for row in selected["chunks"]["index"][item]] == chunks["index"]
    shared = await three.post("/v1/batch/attend", json={**body, "start": 1, "stop": [3, 4]})
    assert shared.json()["status"] == [200] * 3, "one for each query, the same for all sessions"


async def test_truncations(three: httpx.AsyncClient) -> None:
    """One length for all, or for each; a condition; a session that is there twice; binary without a tensor."""
    body = {"sessions": ["s", "no", "t", "u"], "length": [4, 0, 9, 3], "if_length": [5, None, None, 5]}
    answer = (await three.post("/v1/batch/truncate", json=body)).json()
    assert answer["status"] == [200, 404, 422, 409] and answer["errors"][2]["length"] == 6
    assert (answer["length"], answer["num_chunks"]) == ([4, 0, 0, 0], [2, 0, 0, 0])
    content = wire.build({}, {"sessions": ["u", "s", "u"], "length": [5, 0, 1]})
    twice = await three.post("/v1/batch/truncate", content=content, headers={"content-type": wire.MEDIA_TYPE})
    tensors, params = unpack(twice.content)
    assert not tensors and params["status"] == [200] * 3 and params["length"] == [5, 0, 1]
    assert [(await three.get(f"/v1/sessions/{name}")).json()["length"] for name in "stu"] == [0, 5, 1]
    everything = await three.post("/v1/batch/truncate", json={"sessions": ["s", "t", "u"], "length": 0})
    assert everything.json()["length"] == [0, 0, 0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "length is required"),
        ({"length": [0, None, 0]}, "length[1] is null; it must be an integer"),
        ({"length": [0, 0]}, "length is of 2 sessions, sessions has 3"),
        ({"length": 0, "if_length": 3}, "if_length is 3; it must be a list"),
        ({"length": 0, "embeddings": [[1, 0, 0]]}, "unknown field"),
    ]
    for more, said in wrong:
        refused = await three.post("/v1/batch/truncate", json={"sessions": ["s", "t", "u"], **more})
        check_problem(refused, 422, "invalid_argument")
        assert said in refused.json()["detail"]


async def test_an_answer_counts_what_each_item_has_room_for(serve: Serve) -> None:
    """The chunks that queries take were not counted, nor the room of items that fail: a body of 33 MB, with one session
    of 300 chunks and 4,095 names that stand for nothing, had an answer of 13 GB.
    """
    async with serve(max_answer_bytes=20_000, max_json_body_bytes=20_000) as client:
        await client.put("/v1/sessions/s", json={"dim": 1, "chunk_size": 1})
        appended = await client.post("/v1/sessions/s/memories", json={"embeddings": [[1]] * 8})
        assert appended.status_code == 200
        queries = np.ones((5, 41, 1), np.float32)
        body = {"sessions": ["s", *["nobody"] * 4], "top_k": 8, "return": ["chunks"]}
        append = {"embeddings": [[1]] * 5}
        step: dict[str, Any] = {"sessions": [f"s{at}" if at else "s" for at in range(5)], "append": append}
        step["attend"] = {"top_k": 8, "return": ["chunks"]}
        for num_queries, status in ((40, 200), (41, 422)):  # 5 * 40 * (4 + 8 * 12) bytes
            asked = queries[:, :num_queries].tolist()
            step["attend"]["queries"] = asked
            for call, sent in (("attend", {**body, "queries": asked}), ("select", {**body, "queries": asked})):
                answer = await client.post(f"/v1/batch/{call}", json=sent)
                assert answer.status_code == status, call
            answer = await client.post("/v1/batch/step", json=step)
            assert answer.status_code == status
        detail = check_problem(answer, 422, "invalid_argument")["detail"]
        assert "the answer to 205 queries has up to 20500 bytes, the limit of one answer is 20000" in detail
        assert (await client.get("/v1/sessions/s")).json()["length"] == 9, "the second step changed nothing"
