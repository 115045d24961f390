"""Names that a client sends where they are none: one rule for each, and no answer as large as what was sent."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import pytest

from api.wire.safetensors import MEDIA_TYPE
from tests.api.test_errors import check_problem

LONG = "x" * 200_000
"""As much as a body without tensors may hold."""
QUERY = {"queries": [1, 2, 3]}


@pytest.mark.parametrize(
    "name", ["", "a/b", "two words", "x" * 129, LONG], ids=["empty", "slash", "space", "129", "long"]
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/sessions/new", {"dim": 3, "model": None}),
        ("POST", "/v1/sessions", {"dim": 3, "model": None}),
        ("PATCH", "/v1/sessions/s", {"model": None}),
        ("POST", "/v1/sessions/s/attend", {**QUERY, "model": None}),
        ("POST", "/v1/sessions/s/step", {"attend": {**QUERY, "model": None}, "append": {"embeddings": [1, 2, 3]}}),
    ],
    ids=["put", "create", "change", "attend", "step"],
)
async def test_what_is_no_models_name(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any], name: str
) -> None:
    """An empty one meant the default here and an unknown model there; a long one came back twice in the error."""
    attend = {**body.get("attend", body), "model": name}
    answer = await client.request(method, path, json={**body, "attend": attend} if "attend" in body else attend)
    problem = check_problem(answer, 422, "invalid_argument")
    assert problem["detail"].startswith(f"model is {name[:140]!r}"[:-1]) and "must match" in problem["detail"]
    assert len(answer.content) < 1_000
    assert (await client.get("/v1/sessions/s")).json()["length"] == 5


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/sessions/s", {"dim": 3, LONG: 1}),
        ("PUT", "/v1/sessions/s", {"dim": 3, "labels": {LONG: "value"}}),
        ("PUT", "/v1/sessions/s", {"dim": 3, "labels": {f"{at}".zfill(256): "y" * 256 for at in range(64)}}),
        ("PUT", "/v1/sessions/s", {"dim": 3, "labels": {"key": LONG}}),
        ("PUT", "/v1/sessions/s", {"dim": 3, "dtype": LONG}),
        ("PATCH", "/v1/sessions/s", {LONG: 1}),
        ("POST", "/v1/sessions/s/attend", {**QUERY, LONG: 1}),
        ("POST", "/v1/sessions/s/attend", {**QUERY, "rank_by": LONG}),
        ("POST", "/v1/sessions/s/attend", {**QUERY, "return": [LONG]}),
        ("POST", "/v1/sessions/s/memories", {"embeddings": {"b64": "", "shape": [1, 3], "dtype": LONG}}),
        ("GET", f"/v1/sessions/{LONG[:60_000]}", None),
        ("GET", f"/v1/sessions?prefix={LONG[:60_000]}", None),
        ("GET", f"/v1/sessions?label={LONG[:60_000]}:", None),
        ("GET", f"/v1/sessions?cursor={LONG[:60_000]}", None),
        ("GET", f"/v1/models/{LONG[:60_000]}", None),
    ],
)
async def test_an_error_is_short_however_long_what_was_sent(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """The name of an unknown field of 3 MB came back whole."""
    answer = await client.request(method, path, json=body)
    assert 400 <= answer.status_code < 500 and len(answer.content) < 2_000, answer.text[:2_000]


@pytest.mark.parametrize("shape", [[1], [2]], ids=["of another shape", "unknown"])
async def test_an_error_of_a_tensor_is_short_however_long_its_name(client: httpx.AsyncClient, shape: list[int]) -> None:
    """The name of one whose shape is wrong came back whole, 500 kB."""
    header = json.dumps({LONG: {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    body = struct.pack("<Q", len(header)) + header + bytes(8)
    answer = await client.post("/v1/sessions/s/attend", content=body, headers={"Content-Type": MEDIA_TYPE})
    check_problem(answer, 422, "invalid_argument")
    assert len(answer.content) < 1_000


@pytest.mark.parametrize("name", ["a@b", "a b", "é", "a%0A", "x" * 129])
async def test_an_id_with_another_character_says_what_an_id_is(client: httpx.AsyncClient, name: str) -> None:
    for method, rest, body in (
        ("GET", "", None),
        ("PUT", "", {"dim": 3}),
        ("DELETE", "", None),
        ("POST", "/attend", QUERY),
        ("GET", "/chunks", None),
    ):
        answer = await client.request(method, f"/v1/sessions/{name}{rest}", json=body)
        problem = check_problem(answer, 422, "invalid_argument")
        assert "it must match [A-Za-z0-9._~-]{1,128}" in problem["detail"]


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "http://x"])
async def test_an_id_with_a_slash_says_what_an_id_is(client: httpx.AsyncClient, name: str) -> None:
    """It is a path that nobody serves, and the answer said no more than that."""
    for method, rest, body in (("GET", "", None), ("PUT", "", {"dim": 3}), ("POST", "/attend", QUERY)):
        answer = await client.request(method, f"/v1/sessions/{name}{rest}", json=body)
        problem = check_problem(answer, 404, "not_found")
        assert problem["detail"].endswith("; session ids match [A-Za-z0-9._~-]{1,128}, so they have no slash")
    assert "session ids" not in (await client.get("/v1/nothing")).json()["detail"]
