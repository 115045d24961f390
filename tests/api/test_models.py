"""Models over HTTP: put, described, replaced on conditions, deleted, and in the headers of attends."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

from htm_service.attention.convert import from_module
from htm_service.attention.model import ProjectedModel, RetrievalModel
from htm_service.attention.model_file import model_bytes
from htm_service.attention.modules import HTMAttention
from tests.api.conftest import Serve, fill, put_model
from tests.api.test_errors import check_problem


def made(seed: int, dim: int = 3) -> tuple[bytes, str]:
    """The file of random weights, and their hash."""
    torch.manual_seed(seed)
    config, tensors = from_module(HTMAttention(dim, heads=1, topk_mems=2, mem_chunk_size=2, dim_head=2))
    return model_bytes(config, tensors), ProjectedModel(config, tensors).hash


async def put(client: httpx.AsyncClient, file: bytes, name: str = "m", **headers: str) -> httpx.Response:
    headers = {
        "Content-Type": "application/x-safetensors",
        **{key.replace("_", "-"): value for key, value in headers.items()},
    }
    return await client.put(f"/v1/models/{name}", content=file, headers=headers)


async def test_a_model_is_put_and_described(client: httpx.AsyncClient) -> None:
    (file, hash_), (other, other_hash) = made(1), made(2)
    created = await put(client, file)
    assert created.status_code == 201 and created.headers["location"] == "/v1/models/m"
    assert created.headers["etag"] == f'"{hash_}"'
    model = created.json()
    assert (model["hash"], model["bytes"], model["num_sessions"], model["source"]) == (hash_, len(file), 0, "store")
    assert model["created_at"] is not None and model["error"] is None
    assert model["config"] == {
        "dim": 3, "heads": 1, "dim_head": 2, "top_k": 2, "chunk_size": 2, "position_encoding": True, "block": False,
        "summary_scale": 3**-0.5, "attention_scale": 2**-0.5,
    }  # fmt: skip
    assert (await put(client, file)).json() == model, "the same hash again"
    shown = await client.get("/v1/models/m")
    assert shown.json() == model and shown.headers["etag"] == f'"{hash_}"'
    await client.patch("/v1/sessions/s", json={"model": "m"})
    replaced = await put(client, other)
    assert replaced.status_code == 200 and "location" not in replaced.headers
    assert (replaced.json()["hash"], replaced.json()["num_sessions"]) == (other_hash, 1)
    listed = (await client.get("/v1/models")).json()["models"]
    assert [one["name"] for one in listed] == ["m", "retrieval"] and listed[0] == replaced.json()
    assert (listed[1]["source"], listed[1]["bytes"], listed[1]["created_at"]) == ("built-in", None, None)
    check_problem(await client.delete("/v1/models/m"), 409, "model_in_use")
    await client.patch("/v1/sessions/s", json={"model": "retrieval"})
    assert (await client.delete("/v1/models/m")).status_code == 204
    check_problem(await client.get("/v1/models/m"), 404, "model_not_found")


@pytest.mark.parametrize("accept", ["application/json", "application/x-safetensors"])
async def test_answers_say_which_weights(client: httpx.AsyncClient, accept: str) -> None:
    file, hash_ = made(1)
    await put(client, file)
    query: dict[str, Any] = {"queries": [[1, 0, 0]]}
    for model, expected in (("m", hash_), ("retrieval", RetrievalModel().hash)):
        body = {**query, "model": model}
        step = {"attend": body, "append": {"embeddings": [1, 0, 0]}}
        for call, sent in (("attend", body), ("explain", body), ("step", step)):
            answer = await client.post(f"/v1/sessions/s/{call}", json=sent, headers={"Accept": accept})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-model-hash"] == expected
            assert answer.headers["content-type"] == accept and answer.headers["x-batch-size"] == "1"
    recalls = (await client.get("/v1/sessions/s/recalls")).json()["recalls"]
    assert [one["model_hash"] for one in recalls] == [RetrievalModel().hash] * 2 + [hash_] * 2


async def test_conditions(client: httpx.AsyncClient) -> None:
    (file, hash_), (other, other_hash) = made(1), made(2)
    check_problem(await put(client, file, If_Match="*"), 412, "model_conflict")
    assert (await put(client, file, If_None_Match="*")).status_code == 201
    for headers in (
        {"If_None_Match": "*"},
        {"If_None_Match": f'"x", "{hash_}"'},
        {"If_Match": f'"{other_hash}"'},
        {"If_Match": f'W/"{hash_}"'},
    ):
        problem = check_problem(await put(client, other, **headers), 412, "model_conflict")
        assert problem["hash"] == hash_ and hash_ in problem["detail"]
    assert (await put(client, other, If_Match=f'"x", "{hash_}"')).json()["hash"] == other_hash
    for wrong in (hash_, "", '"', '"a" "b"'):
        check_problem(await put(client, file, If_Match=wrong), 422, "invalid_argument")
    stale = {"If-Match": f'"{hash_}"'}
    check_problem(await client.delete("/v1/models/m", headers=stale), 412, "model_conflict")
    two_at_once = await client.delete("/v1/models/m", headers={"If-Match": f'"{other_hash}""x"'})
    check_problem(two_at_once, 422, "invalid_argument")
    emptied = {"If-Match": f', "x",,"{other_hash}" ,'}  # a list may have empty elements
    assert (await client.delete("/v1/models/m", headers=emptied)).status_code == 204


async def test_what_is_no_model(serve: Serve) -> None:
    """Nothing is kept of it, and what is there serves on."""
    file, hash_ = made(1)
    async with serve(max_body_bytes=5_000) as client:
        await fill(client)
        await put(client, file)
        await client.patch("/v1/sessions/s", json={"model": "m"})
        problem = check_problem(await put(client, file + bytes(5_000)), 413, "body_too_large")
        assert "the limit is 5000 (--max-body-bytes)" in problem["detail"]
        for body in (b"", b"{}", file[:-1], file.replace(b"htm-service-model", b"some-other-models")):
            assert "model 'm': " in check_problem(await put(client, body), 422, "invalid_argument")["detail"]
        problem = check_problem(await put(client, made(1, dim=5)[0]), 409, "model_in_use")
        assert "its dim would be 5, and a session that names it has 3" in problem["detail"]
        for name in ("a@b", "a%20b", "x" * 129, "%2e%2e"):
            for method in ("PUT", "GET", "DELETE"):
                headers = {"Content-Type": "application/x-safetensors"}
                answer = await client.request(method, f"/v1/models/{name}", content=file, headers=headers)
                if name != "%2e%2e" or answer.status_code != 404:  # clients may resolve it themselves
                    assert "must match" in check_problem(answer, 422, "invalid_argument")["detail"]
        assert (await client.get("/v1/models/m")).json()["hash"] == hash_
        answer = await client.post("/v1/sessions/s/attend", json={"queries": [1, 0, 0]})
        assert answer.headers["x-model-hash"] == hash_


async def test_models_of_namespaces(keyed: httpx.AsyncClient) -> None:
    """One's own, and those of `shared`, which only who opens that may write."""
    (file, hash_), (other, other_hash) = made(1), made(2)
    shared = {"X-HTM-Namespace": "shared", "Content-Type": "application/x-safetensors"}
    blue = {"X-HTM-Namespace": "blue", "Content-Type": "application/x-safetensors"}
    assert (await keyed.put("/v1/models/all", content=file, headers=shared)).status_code == 201
    assert (
        await keyed.put("/v1/sessions/s", json={"model": "all"}, headers={"X-HTM-Namespace": "blue"})
    ).status_code == 201
    names = [one["name"] for one in (await keyed.get("/v1/models", headers=blue)).json()["models"]]
    assert names == ["all", "retrieval"], "m is of another namespace"
    assert (await keyed.get("/v1/models/all", headers=blue)).json()["num_sessions"] == 1
    assert (await keyed.get("/v1/models/all")).json()["num_sessions"] == 0, "a count of others' sessions says nothing"
    check_problem(await keyed.delete("/v1/models/all"), 404, "model_not_found")
    assert (await keyed.put("/v1/models/all", content=other, headers=blue)).status_code == 201
    assert (await keyed.get("/v1/models/all", headers=blue)).json()["hash"] == other_hash
    assert (await keyed.get("/v1/models/all")).json()["hash"] == hash_
    assert (await put_model(keyed, "all")).status_code == 201
