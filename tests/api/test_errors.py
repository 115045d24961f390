"""The table of codes and statuses, and that every answer to a failure is a problem document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api import errors
from htm_service.errors import HTMError


def subclasses(kind: type[HTMError]) -> Iterator[type[HTMError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_domain_error_has_a_status() -> None:
    with_code = [kind for kind in subclasses(HTMError) if "code" in vars(kind)]
    assert len(with_code) > 10
    for kind in with_code:
        assert kind.code in errors.PROBLEMS, kind
        assert 400 <= errors.PROBLEMS[kind.code].status < 600
        assert errors.PROBLEMS[kind.code].status != 500


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in subclasses(HTMError) if "code" in vars(kind)]
    assert len(set(codes)) == len(codes)


def test_own_fields_win_over_extra_ones() -> None:
    made = errors.document("length_conflict", "no", "r1", {"length": 4, "status": 200})
    assert made["length"] == 4
    assert made["status"] == 409


def test_long_values_are_cut() -> None:
    assert errors.shorten("x" * 10**6) == repr("x" * 140 + "...")
    assert len(errors.shorten([1] * 10**6)) < 150
    assert len(errors.shorten({"k": "v" * 1000})) < 150


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["type"] == f"urn:htm-service:problem:{code}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["title"] == errors.PROBLEMS[code].title
    assert problem["detail"]
    return problem


async def test_unknown_path_and_method(client: httpx.AsyncClient) -> None:
    check_problem(await client.get("/v1/nothing"), 404, "not_found")
    refused = await client.put("/v1/info")
    check_problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "HEAD, GET"
    refused = await client.delete("/v1/sessions/s/memories")
    check_problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "HEAD, GET, POST"
    refused = await client.post("/v1/sessions/s")  # each method has a route of its own
    check_problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "HEAD, GET, PUT, PATCH, DELETE"


async def test_length_conflict_tells_the_length(client: httpx.AsyncClient) -> None:
    body = {"embeddings": [1, 2, 3], "if_length": 4}
    problem = check_problem(await client.post("/v1/sessions/s/memories", json=body), 409, "length_conflict")
    assert problem["length"] == 5


@pytest.mark.parametrize(("given", "kept"), [("a-Z_0.9", True), ("x" * 65, False), ("two words", False), ("", False)])
async def test_request_ids(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    for method, path in (("GET", "/livez"), ("GET", "/v1/sessions/s/memories"), ("POST", "/v1/sessions/s/attend")):
        answer = await client.request(method, path, headers={"X-Request-Id": given})
        (found,) = answer.headers.get_list("x-request-id")
        assert (found == given) is kept
        assert len(found) == (len(given) if kept else 32)
